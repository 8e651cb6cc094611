"""All readers of files that users write, download or keep: each reads one mutated input per call."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fake_runs
import yaml
from fuzz.mutations import ODD, mutate, mutate_bytes, mutate_json
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.converters import EXPORTERS, FORMATS, converter, exporter, row_converter
from xlam_jax.data.converters.common import Converted, convert_one, read_rows
from xlam_jax.data.files import read_lines
from xlam_jax.data.render import end_tokens, render_prompt
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.tokenizer import load_tokenizer, text_to_ids_digest
from xlam_jax.data.trajectory import InvalidTrajectory, to_dict
from xlam_jax.data.validate import check_row
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.models.generation_config import read_generation_config
from xlam_jax.report import page, runs, samples
from xlam_jax.report.figures import Report
from xlam_jax.training import run_folder
from xlam_jax.weights import checkpoint, peft_config
from xlam_jax.weights import run as weights
from xlam_jax.weights.hf import HFWeights
from xlam_jax.weights.shards import DTYPES, TensorSpec, make_header

Read = Callable[[Random], object]
"""Reads one mutated input; the generator decides which."""
QUICKSTART = ROOT / "configs/quickstart.yaml"
DATA = ROOT / "tests/data/fixtures"
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
    "bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {"q_proj": 8}, "modules_to_save": None,
    "base_model_name_or_path": "a/b", "fan_in_fan_out": False, "layers_to_transform": None, "exclude_modules": None,
}  # fmt: skip
SMALL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 8, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "sliding_window": None,
}  # fmt: skip


def config(folder: Path) -> Read:
    """A YAML config, and one that extends it."""
    values = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8")) | {"schema_version": 1}
    path, child = folder / "config.yaml", folder / "child.yaml"
    child.write_text("extends: config.yaml\ntrain: {steps: 30, warmup_steps: 1}\n", encoding="utf-8")

    def read(draw: Random) -> None:
        if draw.random() < 0.4:
            path.write_bytes(mutate_bytes(draw, QUICKSTART.read_bytes()))
        else:
            text = yaml.safe_dump(mutate(draw, values)) if draw.random() < 0.2 else json.dumps(mutate(draw, values))
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        configs.describe(configs.load(draw.choice((path, child))))

    return read


def saved_config(folder: Path) -> Read:
    """The config.yaml of a run."""
    path = folder / "config.yaml"
    text = configs.to_yaml(configs.load(QUICKSTART).config)
    values = yaml.safe_load(text)

    def read(draw: Random) -> None:
        if draw.random() < 0.3:
            path.write_bytes(mutate_bytes(draw, text.encode()))
            configs.read_saved(path)
        else:
            configs.from_saved(mutate(draw, values), "run")

    return read


def overrides(_: Path) -> Read:
    """Overrides on a command line."""
    resolved = configs.load(QUICKSTART).config
    fields = [name for name, _ in configs.flatten(resolved)]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in ODD]

    def read(draw: Random) -> None:
        drawn = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            name, value = draw.choice(fields), draw.choice(texts)
            if draw.random() < 0.2:
                parts = name.split(".")
                parts[draw.randrange(len(parts))] = draw.choice(("", "x", "0", "5", "-1", "overrides", "data"))
                name = ".".join(parts) + draw.choice(("", "", ".x", ".0", "."))
            text = f"{name}={value}"
            if draw.random() < 0.2:
                text = mutate_bytes(draw, text.encode(errors="surrogatepass")).decode(errors="surrogateescape")
            drawn.append(text)
        configs.load(QUICKSTART, drawn)

    return read


def hf_config(folder: Path) -> Read:
    """config.json, alone and with model.overrides; generation_config.json; adapter_config.json."""
    models = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "configs/models").glob("*.json"))]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": None,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False}  # fmt: skip
    full = [
        model | {"rope_scaling": (None, llama3, yarn)[at % 3], "rope_parameters": None, "eos_token_id": [2, 3],
                 "quantization_config": None, "layer_types": None, "dtype": "bfloat16", "hidden_dropout": 0.1}
        for at, model in enumerate(models)
    ]  # fmt: skip
    text = {"model_type": "ministral3", "head_dim": 16, "rope_parameters": yarn | {"llama_4_scaling_beta": 0.1}}
    wrapped = {"architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "vision_config": {},
               "text_config": {**models[0], **text}}  # fmt: skip
    generation = {"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.7, "_from_model_config": True}

    def read(draw: Random) -> None:
        kind = draw.random()
        if kind < 0.1:
            (folder / "generation_config.json").write_bytes(mutate_json(draw, generation))
            read_generation_config(folder / "generation_config.json")
        elif kind < 0.3:
            (folder / peft_config.CONFIG).write_bytes(mutate_json(draw, ADAPTER))
            peft_config.read_config(folder).refuse_patterns()
        else:
            path = folder / "config.json"
            path.write_bytes(mutate_json(draw, draw.choice((*models, *full, wrapped))))
            hf = read_hf_config(path)
            if draw.random() < 0.3:
                changed = mutate(draw, {"rope_theta": 1e4, "rope_scaling": llama3, "sliding_window": 32, "dtype": "x"})
                hf = hf_keys.with_overrides(hf, changed if isinstance(changed, dict) else {}, str(path))
            model = ModelConfig.from_hf(hf, str(path))
            model.parameters()
            kept, _ = hf_keys.without_quantization(hf, str(path))
            hf_keys.warnings_of(kept, model.family, str(path))

    return read


def safetensors(folder: Path) -> Read:
    """The header of a file with weights, and the index of several files."""
    import numpy as np

    config = ModelConfig.from_hf(SMALL)
    from xlam_jax.weights.hf_map import tensors

    places = [TensorSpec(tensor.key, np.dtype(np.float32), tensor.shape) for tensor in tensors(config)]
    file = make_header(places) + bytes(sum(place.bytes for place in places))
    length = int.from_bytes(file[:8], "little")
    header, rest = json.loads(file[8 : 8 + length]), file[8 + length :]
    index = {"metadata": {"total_size": 1}, "weight_map": {place.key: "model.safetensors" for place in places}}
    (folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    single, listed = folder / "model.safetensors", folder / "model.safetensors.index.json"

    def read(draw: Random) -> None:
        listed.unlink(missing_ok=True)
        kind = draw.random()
        if kind < 0.2:  # several files
            single.write_bytes(file)
            single.rename(folder / "a.safetensors")
            named = json.dumps(index).replace("model.safetensors", "a.safetensors")
            listed.write_bytes(mutate_json(draw, json.loads(named)))
        elif kind < 0.4:
            single.write_bytes(mutate_bytes(draw, file[: 8 + length]) + rest)
        else:
            changed = mutate(draw, header)
            if draw.random() < 0.2 and isinstance(changed, dict):
                key = draw.choice([*changed])
                changed[draw.choice(("_orig_mod.", "base_model.model.", "module.", "x")) + key] = changed.pop(key)
            if draw.random() < 0.2 and isinstance(changed, dict):
                entry = draw.choice([*changed.values()])
                if isinstance(entry, dict):
                    entry["dtype"] = draw.choice(("F16", "F64", "BF16", "I8", "F8_E4M3"))
            text = json.dumps(changed).encode()
            single.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        opened = HFWeights(folder)
        for _, source in opened.sources[:3]:
            assert source.dtype in DTYPES.values()
            source.read()

    return read


def tokenizer(folder: Path) -> Read:
    """A tokenizer folder."""
    source = ROOT / "examples/quickstart/tokenizer"
    texts = {path.name: path.read_text(encoding="utf-8") for path in source.iterdir()}
    whole = json.loads(texts["tokenizer.json"])
    vocab = dict(list(whole["model"]["vocab"].items())[:400])
    merges = [merge for merge in whole["model"]["merges"] if "".join(merge) in vocab and set(merge) <= vocab.keys()]
    small = whole | {"model": whole["model"] | {"vocab": vocab, "merges": merges[:20]}}
    texts["tokenizer.json"] = json.dumps(small)
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    values = {"tokenizer.json": small, "tokenizer_config.json": json.loads(texts["tokenizer_config.json"]),
              "special_tokens_map.json": special}  # fmt: skip
    frame = {key: value for key, value in small.items() if key != "model"}
    load_tokenizer(str(source))  # imports take longer than any input

    def read(draw: Random) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        name = draw.choice((*values, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
        if name not in values:
            content = mutate_bytes(draw, texts[name].encode())
        elif name == "tokenizer.json" and draw.random() < 0.6:  # its parts except the vocabulary
            part = mutate(draw, frame)
            content = json.dumps({**part, "model": small["model"]} if isinstance(part, dict) else part).encode()
        else:
            content = mutate_json(draw, values[name])
        (folder / name).write_bytes(content)
        if draw.random() < 0.05:
            (folder / draw.choice(list(texts))).unlink()
        loaded = load_tokenizer(str(folder))
        text_to_ids_digest(loaded)
        end_tokens(loaded)
        render_prompt([{"role": "user", "content": "Hi"}], [], loaded)

    return read


def run(folder: Path) -> Read:
    """A run folder, as read by the report, a resumed run and an export, without its arrays."""
    kept = fake_runs.write_run(folder / "run", steps=20, every=10, requests=2)
    text = configs.to_yaml(configs.load(QUICKSTART).config)
    (kept / "config.yaml").write_text(text, encoding="utf-8")
    (kept / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    step = kept / STEPS_FOLDER / "20"
    (step / "params").mkdir(parents=True)
    metadata = {"item_handlers": {"params": "x"}, "custom_metadata": {"config": yaml.safe_load(text), "model": SMALL}}
    (step / checkpoint.METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    whole = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    names = sorted(whole)

    def read(draw: Random) -> None:
        for name, content in whole.items():
            (kept / name).write_bytes(content)
        name = draw.choice(names)
        path = kept / name
        match draw.randrange(4):
            case 0:
                path.write_bytes(mutate_bytes(draw, whole[name]))
            case 1 if draw.random() < 0.2:
                path.unlink()
            case _ if name.suffix == ".jsonl":
                lines = whole[name].splitlines()
                at = draw.randrange(len(lines))
                lines[at] = mutate_json(draw, json.loads(lines[at]))
                path.write_bytes(b"\n".join(lines) + b"\n")
            case _ if name.suffix == ".yaml":
                path.write_text(json.dumps(mutate(draw, yaml.safe_load(whole[name]))), encoding="utf-8")
            case _:
                path.write_bytes(mutate_json(draw, json.loads(whole[name])))
        run_folder.read_run(kept / "run.json", lambda line: None)
        if name.parts[0] == STEPS_FOLDER or name.name == "config.json":
            weights.saved_run(checkpoint.resolve(kept))
            checkpoint.load_hf_config(step)
            checkpoint.tokenizer_dir(step)
            checkpoint.load_generation_config(step)
        else:
            read = runs.read(kept, "run")
            "".join(page.render(Report([read], [samples.read(kept, read.warnings)])))

    return read


FILES = {
    "webshop": ["webshop.jsonl"],
    "hotpotqa": ["hotpotqa.jsonl"],
    "alfworld": ["alfworld/mint_gpt-4-0613.jsonl"],
    "intercode": ["intercode/ic_bash.json"],
    "tau_bench": ["tau_bench/gpt-4o-airline.json"],
    "toolalpaca": ["toolalpaca/eval_simulated.json"],
    "api_bank": ["api_bank/dialogues.jsonl"],
    "toolbench": ["toolbench/G1_answer/57_ChatGPT_DFS_woFilter_w2.json"],
    "seal_tools": ["seal_tools/dev.jsonl"],
    "hammer": ["hammer.json"],
    "apibench": ["apibench.json"],
    "agentohana": ["agentohana.jsonl"],
    "train_ready": ["train_ready.jsonl"],
    "xlam60k": ["xlam60k.jsonl"],
}
FUNCTION = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
OTHERS: dict[str, list[Any]] = {
    "openai": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {"role": "assistant", "content": None, "weight": 1, "reasoning_content": "I look it up.",
                 "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}]},
                {"role": "tool", "tool_call_id": "c1", "content": "sun"},
                {"role": "assistant", "content": "Sunny.", "function_call": None},
            ],
            "tools": [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {
                "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}],
            "id": "a", "source": "s", "score": 1.0,
        },
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "function_call": FUNCTION},
                {"role": "function", "name": "get_weather", "content": "sun"},
                {"role": "assistant", "content": "Sunny."},
            ],
            "functions": [{"name": "get_weather", "parameters": {"type": "object", "properties": {}}}],
        },
    ],
    "sharegpt": [
        {
            "system": "Be brief.", "tools": '[{"name": "get_weather", "description": "d", "parameters": {}}]',
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "gpt", "value": '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'},
                {"from": "tool", "value": "<tool_response>sun</tool_response>"},
                {"from": "gpt", "value": "Sunny."},
            ],
        },
    ],
    "alpaca": [{"instruction": "Say hi.", "input": "In French.", "output": "Salut.", "history": [["a", "b"]],
                "system": "s"}],
}  # fmt: skip


MIXED = {
    "query": "Weather?",
    "tools": [
        {"name": "a", "parameters": {"city": {"type": "str, optional", "default": "Oslo"}, "n": {"type": "int"}}},
        {
            "name": "b",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
        {
            "name": "c",
            "parameters": {"x": {"type": "str", "required": True}, "y": {"type": "List[int]", "required": False}},
        },
        {"type": "function", "function": {"name": "d", "parameters": {"type": "object", "properties": None}}},
        {"name": "e", "parameters": '{"type": {"type": "str"}, "properties": {"type": "dict"}}'},
        {"name": "f", "parameters": None},
    ],
    "answers": [{"name": "a", "arguments": {"city": "Oslo", "n": "1"}}, {"name": "b", "arguments": '{"city": "x"}'}],
}
"""Tools whose parameters are written in every form that there is."""


def rows(folder: Path) -> Read:
    """Rows of every format, one by one; and files of them."""
    starts: dict[str, list[Any]] = {}
    for name in FORMATS:
        paths = [DATA / file for file in FILES.get(name, ())]
        if name == "apibench":  # one row per line, whatever the file's name says
            candidates: list[Any] = [parse_json(line) for path in paths for _, line in read_lines(path)]
        else:
            candidates = OTHERS.get(name) or [
                read.row for path in paths for read in read_rows(path) if isinstance(read.row, dict)
            ]
        if name == "unified":
            lines = (ROOT / "examples/quickstart/webshop.jsonl").read_bytes().splitlines()[:2]
            candidates = [parse_json(line) for line in lines]
        starts[name] = sorted(candidates, key=lambda row: len(str(row)))[:4]
        starts[name] += [MIXED] * (name in ("xlam60k", "hammer"))
    alone = [name for name in FORMATS if row_converter(name) is not None]

    def read(draw: Random) -> None:
        if draw.random() < 0.7:
            name = draw.choice(alone)
            row = mutate(draw, draw.choice(starts[name]))
            row = row if isinstance(row, dict) else InvalidTrajectory("not-an-object", "a row is a JSON object")
            convert_row = row_converter(name)
            assert convert_row is not None
            items = list(convert_one(folder / "rows.jsonl", 1, row, convert_row))
            assert items
            for item in items:
                if isinstance(item, Converted):
                    check_row(to_dict(item.trajectory))
                    list(exporter(draw.choice(EXPORTERS))(item.trajectory))
            return
        name = draw.choice(FORMATS)
        start = draw.choice(starts[name])
        lines = [mutate_json(draw, start), json.dumps(start).encode()]
        path = folder / draw.choice(("rows.jsonl", "rows.json"))
        text = b"\n".join(lines) if path.suffix == ".jsonl" else b"[" + b",".join(lines) + b"]"
        path.write_bytes(text if draw.random() < 0.8 else mutate_bytes(draw, text))
        if draw.random() < 0.5:
            list(converter(name)([path]))
        else:
            list(sources.read(Source(name="made", files=[str(path)], format=name)))

    return read


READERS: dict[str, Callable[[Path], Read]] = {
    read.__name__: read for read in (config, saved_config, overrides, hf_config, safetensors, tokenizer, run, rows)
}
