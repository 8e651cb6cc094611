"""The schema: origins, overrides, and messages for wrong values."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from support import ROOT

from xlam_jax import config as configs
from xlam_jax import enums
from xlam_jax.config.defaults import FROM_RANDOM, LEARNING_RATES
from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig, read_hf_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves(path: Path):
    resolved = configs.load(path)
    assert configs.Config.model_validate(yaml.safe_load(configs.to_yaml(resolved.config))) == resolved.config


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("mistral_7b_v0.1", 7.24),
        ("mistral_7b_v0.2", 7.24),
        ("mistral_7b_v0.3", 7.25),
        ("mixtral_8x7b", 46.7),
        ("mixtral_8x22b", 140.6),
        ("deepseek_coder_1.3b", 1.35),
        ("deepseek_coder_6.7b", 6.74),
        ("smollm2_135m", 0.1345),
    ],
)
def test_presets_have_the_published_sizes(preset: str, billions: float):
    path = ROOT / f"configs/models/{preset}.json"
    model = ModelConfig.from_hf(read_hf_config(path))
    assert model.parameters() / 1e9 == pytest.approx(billions, rel=5e-3)


def test_origins_follow_extends_and_overrides(tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {QUICKSTART}\ntrain: {{steps: 7, warmup_steps: 1}}\n", encoding="utf-8")
    resolved = configs.load(child, ["train.learning_rate=1e-4", "seed=3"])
    assert (resolved.config.train.steps, resolved.config.train.learning_rate, resolved.config.seed) == (7, 1e-4, 3)
    lines = {line.split(":")[0]: line for line in configs.describe(resolved).splitlines()}
    assert lines["train.steps"].endswith(f"# {child}")
    assert lines["train.learning_rate"].endswith("# command line")
    assert lines["data.tokenizer"].endswith(f"# {QUICKSTART}")
    assert lines["train.beta1"].endswith("# default")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "unknown key train.stepz; did you mean 'steps'?"),
        (["trian.steps=3"], "unknown key trian; did you mean 'train'?"),
        (["train.steps=abc"], "command line: train.steps is 'abc'"),
        (["train.steps=0"], "train.steps is 0"),
        (["train.steps=3.5"], "train.steps is 3.5"),
        (["model.compute_dtype=float8"], "'float32' or 'bfloat16'"),
        (["train.steps"], "expected section.key=value"),
        (["seed.x=1"], "command line: seed is {'x': 1}"),
        (["data.sources=[]"], "data.sources"),
        (["data.sources=[{nam: a, files: [b]}]"], "unknown key data.sources.0.nam; did you mean 'name'?"),
        (["mesh.data=-1"], "mesh.data and mesh.fsdp are both -1"),
        (["mesh.data=0"], "mesh.data is 0"),
        (
            ["mesh.fsdp=3"],
            "train.batch_size (1) must be a multiple of mesh.data × mesh.fsdp × mesh.expert × train.micro",
        ),
        (["mesh.fsdp=1", "mesh.tensor=4"], "num_key_value_heads (2) must be a multiple of mesh.tensor (4)"),
        (["train.warmup_steps=99999"], "train.warmup_steps is 99999, not less than train.steps"),
        (["train.end_learning_rate=1"], "train.end_learning_rate is 1"),
        (["data.streams=3", "train.batch_size=4"], "train.batch_size is 4 and data.streams is 3"),
        (["data.sequence_length=1000000"], "data.sequence_length is 1000000, more than the model's"),
        (["model.overrides.num_attention_heads=3"], "num_attention_heads is 3 and num_key_value_heads is 2"),
        (["model.overrides.architectures=[GPT2LMHeadModel]"], "MixtralForCausalLM"),
        (["model.overrides.rope_scaling={rope_type: longrope, factor: 2}"], "'longrope' is not implemented"),
        (["model.overrides.num_hiden_layers=1"], "no such key; did you mean 'num_hidden_layers'?"),
        (["model.overrides.rope_theta=.nan"], "rope_theta is nan; a number above 0 is needed"),
        (["model.overrides.rms_norm_eps=-5"], "with model.overrides: rms_norm_eps is -5; a decimal number above 0"),
        (["model.overrides.tie_word_embeddings='false'"], "tie_word_embeddings is 'false'; true or false is needed"),
        (["model.overrides.vocab_size=null"], "vocab_size is None; a positive whole number"),
        (["model.overrides.sliding_window=0"], "sliding_window is 0; a positive whole number"),
        (["model.overrides.bos_token_id=2020-01-01"], "bos_token_id is '2020-01-01'; a token's number is needed"),
        (["model.config=nowhere.json"], "nowhere.json: no such file"),
        (["data.sources.4.weight=2"], "data.sources is a list, and '4' is not one of its elements (it has 4, numbered"),
        (["data.sources.hammer.weight=2"], "'hammer' is not one of its elements"),
        (["data.sources.-1.weight=2"], "'-1' is not one of its elements"),
        (["lora.targets=[]", "lora.targets.0=q"], "'0' is not one of its elements (it is empty)"),
        (["data.sources.0.weigth=2"], "command line: unknown key data.sources.0.weigth; did you mean 'weight'?"),
        (["data.sources.0.name.x=2"], "data.sources.0.name is a value, not a section"),
        (["data.sources.3.tfds=x"], "data.sources.3: source hammer gives files and tfds; give one of"),
        (["data.sources.3.epochs=2"], "configs/quickstart.yaml; data.sources.3.epochs: command line)"),
        (["train.epochs=2"], "train.steps is 1700 and train.epochs is 2.0; give one of them"),
        (["train.warmup_ratio=0.1"], "train.warmup_steps is 20 and train.warmup_ratio is 0.1; give one of them"),
        (["train.schedule=wsd"], "train.schedule is wsd with decay_steps 0; 1 to 1680 are possible with 1700 steps"),
        (["train.decay_steps=2"], "train.decay_steps is 2 and train.schedule cosine; it is for wsd"),
        (["train.moments=8bit", "train.optimizer=lion"], "train.moments is 8bit and train.optimizer is lion"),
        (["eval.every=0", "eval.requests=3"], "eval.requests is 3 and eval.every is 0, which disables evaluation"),
        (["eval.every=0", "checkpoint.best=heldout.loss"], "checkpoint.best is heldout.loss and eval.every is 0"),
        (["checkpoint.best=heldout.los"], "which no evaluation of this run gives; did you mean 'heldout.loss'?"),
        (["export=3"], "export is 3; true, false or the name of a folder is expected"),
        (["schema=1"], "schema is 1: input should be greater than or equal to 2"),
        (["objective.kind=sigmoid"], "data.sources.0 (webshop): format is unified, and objective.kind sigmoid learns"),
        (["objective.margin=1"], "objective.margin is 1.0 and objective.kind is sft; it is for simpo"),
        (["data.share=tokens", "data.sources.0.weight=0"], "command line: data.sources.0.weight is 0"),
        (["train.trainable=lora", "lora.targets=[q, q]"], "lora.targets names a weight twice: q, q"),
        (["train.trainable=lora", "lora.targets=[q_proj]"], "this project's name for it is q"),
    ],
)
def test_wrong_values_are_named(overrides: list[str], message: str):
    with pytest.raises(UserError) as error:
        configs.load(QUICKSTART, overrides)
    assert message in str(error.value)


def test_what_the_config_json_asks_for_is_used_or_reported(tmp_path: Path):
    hf = json.loads((ROOT / "configs/models/tiny_mixtral.json").read_text())
    del hf["rope_theta"]
    hf |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "router_jitter_noise": 0.1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf | {"router_aux_loss_coef": 0.5, "quantization_config": {"quant_method": "fp8"}}))
    overrides = [f"model.config={path}", "model.overrides.rope_theta=5e6"]
    resolved = configs.load(QUICKSTART, [*overrides, "train.router_aux_weight=0.02"])
    assert resolved.model.rope_theta == 5e6
    assert resolved.hf_config["rope_parameters"]["rope_theta"] == 5e6
    assert "quantization_config" not in resolved.hf_config
    assert resolved.warnings == (
        f"{path}: quantization_config (fp8) is dropped; the weights are not quantized",
        f"{path}: router_jitter_noise is 0.1, which transformers applies in training and this project does not",
        f"{path}: router_aux_loss_coef is 0.5; train.router_aux_weight, 0.02, is used",
    )
    assert resolved.config.train.router_aux_weight == 0.02
    assert configs.load(QUICKSTART).warnings == ()


def test_files_that_are_no_configs(tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    cases = [("a: [", "not valid YAML"), ("- a", "a mapping of sections"), (f"extends: {broken}", "itself")]
    for text, message in cases:
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            configs.load(broken)
    with pytest.raises(UserError, match=r"did you mean 'quickstart\.yaml'"):
        configs.load(ROOT / "configs/quickstrat.yaml")


def test_every_field_is_documented():
    help_text = configs.field_help()
    assert "None" not in [line.strip() for line in help_text.splitlines()]
    for name, _ in configs.flatten(configs.load(QUICKSTART).config):
        assert re.sub(r"\.\d+\.", ".N.", name) in help_text


def test_fields_that_peers_know_by_another_name_say_so():
    help_text = configs.field_help()
    for name in ("radient accumulation", "(gradient) checkpointing", "Peak learning rate", "max_grad_norm"):
        assert name in help_text


def test_an_element_of_a_list_is_overridden_alone():
    resolved = configs.load(QUICKSTART, ["data.sources.0.weight=2", "data.sources.2.filters.min_turns=3"])
    before = configs.load(QUICKSTART).config.data.sources
    after = resolved.config.data.sources
    assert after[0] == before[0].model_copy(update={"weight": 2.0})
    assert after[2].filters.min_turns == 3
    assert [after[1], after[3]] == [before[1], before[3]]
    lines = {line.split(":")[0]: line for line in configs.describe(resolved).splitlines()}
    assert lines["data.sources.0.weight"].endswith("# command line")
    assert lines["data.sources.0.name"].endswith(f"# {QUICKSTART}")


def test_elements_that_share_an_alias_are_overridden_apart(tmp_path: Path):
    path = tmp_path / "alias.yaml"
    path.write_text(
        f"extends: {QUICKSTART}\ndata:\n  sources:\n    - &one {{files: [a.jsonl], filters: {{min_turns: 1}}}}\n"
        "    - *one\n",
        encoding="utf-8",
    )
    sources = configs.load(path, ["data.sources.0.name=x", "data.sources.0.filters.min_turns=5"]).config.data.sources
    assert [source.filters.min_turns for source in sources] == [5, 1]
    assert [source.name for source in sources] == ["x", "a"]


def test_a_later_override_of_a_whole_list_hides_an_earlier_one():
    sources = "data.sources=[{name: a, files: [b.jsonl]}]"
    resolved = configs.load(QUICKSTART, ["data.sources.0.weight=2", sources])
    assert resolved.config.data.sources[0].weight is None
    assert "data.sources.0.weight" not in resolved.origins


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights in Hugging Face format, without the weights themselves."""
    folder = tmp_path / "weights"
    shutil.copytree(ROOT / "examples/quickstart/tokenizer", folder)
    shutil.copy(ROOT / "configs/models/tiny_mixtral.json", folder / "config.json")
    return folder


def write_first(tmp_path: Path, weights: Path, train: str = "{batch_size: 12}") -> Path:
    path = tmp_path / "first.yaml"
    path.write_text(
        f"model: {{init_from: {weights}}}\ndata: {{sources: [{{files: [mine/chats.jsonl.gz]}}]}}\ntrain: {train}\n",
        encoding="utf-8",
    )
    return path


def test_a_first_config_needs_data_model_and_batch_size_only(tmp_path: Path, weights: Path):
    resolved = configs.load(write_first(tmp_path, weights))
    values = dict(configs.flatten(resolved.config))
    expected = {
        "output_dir": "runs/first",
        "model.config": str(weights),
        "data.tokenizer": str(weights),
        "data.sequence_length": 2048,
        "data.streams": 6,
        "data.sources.0.name": "chats",
        "train.epochs": 1.0,
        "train.steps": 0,
        "train.learning_rate": 5e-6,
        "train.router_aux_weight": 0.02,
        "export": False,
    }
    assert {name: values[name] for name in expected} == expected
    described = configs.describe(resolved)
    assert re.search(r"data.streams: 6 +# default: a divisor of train.batch_size", described)
    jsonschema.validate(yaml.safe_load((tmp_path / "first.yaml").read_text()), configs.json_schema())


def test_what_a_first_config_lacks_is_one_message(tmp_path: Path, weights: Path):
    (weights / "tokenizer_config.json").unlink()
    path = write_first(tmp_path, weights)
    with pytest.raises(UserError, match=r"data\.tokenizer is missing; model\.init_from, .* has no tokenizer_config"):
        configs.load(path)
    (weights / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.config is missing; model\.init_from, .* has no config\.json here"):
        configs.load(path)
    with pytest.raises(UserError, match=r"train\.batch_size is missing; it has no default"):
        configs.load(write_first(tmp_path, weights, "{steps: 3}"))


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], FROM_RANDOM),
        (["model.init_from=somewhere"], LEARNING_RATES["sft", "full"]),
        (["train.trainable=lora"], LEARNING_RATES["sft", "adapters"]),
        (["train.trainable=qlora", "train.optimizer=lion"], LEARNING_RATES["sft", "adapters"] / 5),
        (["train.trainable=lora", "objective.kind=ipo"], LEARNING_RATES["pairs", "adapters"]),
        (["objective.kind=sigmoid"], LEARNING_RATES["pairs", "full"]),
    ],
)
def test_the_learning_rate_depends_on_the_kind_of_training(overrides: list[str], rate: float):
    preset = ROOT / "configs/quickstart_dpo.yaml" if "objective" in "".join(overrides) else QUICKSTART
    clear = ["train.learning_rate=null", "train.end_learning_rate=0"]
    config = configs.load(preset, [*clear, *overrides]).config
    assert config.train.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(("rows", "streams"), [(1, 1), (2, 2), (7, 7), (8, 8), (11, 1), (12, 6), (48, 8), (64, 8)])
def test_streams_divide_the_batch(rows: int, streams: int):
    config = configs.load(QUICKSTART, ["data.streams=null", f"train.batch_size={rows}"]).config
    assert config.data.streams == streams


def test_the_router_weight_is_that_of_the_model(tmp_path: Path):
    hf = json.loads((ROOT / "configs/models/tiny_mixtral.json").read_text())
    path = tmp_path / "config.json"
    for change, expected in (({"router_aux_loss_coef": 0.5}, 0.5), ({"router_aux_loss_coef": None}, 0.001)):
        path.write_text(json.dumps({key: value for key, value in (hf | change).items() if value is not None}))
        resolved = configs.load(QUICKSTART, [f"model.config={path}"])
        assert (resolved.config.train.router_aux_weight, resolved.warnings) == (expected, ())
    path.write_text(json.dumps(hf | {"router_aux_loss_coef": -1}))
    with pytest.raises(UserError, match=r"default: .*router_aux_loss_coef: train\.router_aux_weight is -1"):
        configs.load(QUICKSTART, [f"model.config={path}"])


def test_rows_are_no_longer_than_the_model_allows():
    overrides = ["data.sequence_length=null", "model.overrides.max_position_embeddings=1536"]
    assert configs.load(QUICKSTART, overrides).config.data.sequence_length == 1536


def test_a_warmup_ratio_becomes_steps():
    for ratio, expected in ((0.03, 51), (0.07, 119), (0.0001, 1), (0.9999, 1699)):
        overrides = ["train.warmup_steps=0", f"train.warmup_ratio={ratio}"]
        resolved = configs.load(QUICKSTART, overrides)
        train = resolved.config.train
        assert (train.warmup_steps, train.warmup_ratio) == (expected, None)
        assert resolved.origins["train.warmup_steps"] == f"command line (warmup_ratio {ratio})"


def test_epochs_and_a_warmup_ratio_become_steps_once_these_are_known():
    overrides = ["train.steps=null", "train.epochs=3", "train.warmup_steps=0", "train.warmup_ratio=0.1"]
    resolved = configs.load(QUICKSTART, overrides)
    assert (resolved.config.train.steps, resolved.config.train.warmup_ratio) == (0, 0.1)
    train = configs.with_steps(resolved, 50).config.train
    assert (train.steps, train.epochs, train.warmup_steps, train.warmup_ratio) == (50, None, 5, None)
    same = configs.load(QUICKSTART, ["train.steps=50", "train.warmup_steps=5"]).config
    assert configs.differences(same, configs.with_steps(resolved, 50).config) == []
    assert configs.differences(same, resolved.config) == []  # the length is compared once it is known
    too_few = configs.load(QUICKSTART, ["train.steps=null", "train.epochs=3"])
    with pytest.raises(UserError, match=r"train\.warmup_steps is 20, not less than train\.steps, 10"):
        configs.with_steps(too_few, 10)


def test_evaluation_is_due_and_can_be_disabled():
    every_100 = configs.load(QUICKSTART, ["eval.every=100"]).config.eval
    assert [step for step in range(301) if every_100.is_due(step)] == [0, 100, 200, 300]
    assert every_100.is_due(250, last=True)
    never = configs.load(QUICKSTART, ["eval.every=0"]).config.eval
    assert not any(never.is_due(step, last=step == 300) for step in range(301))


def test_export_names_a_folder():
    for value, folder in (("true", Path("runs/quickstart/hf")), ("weights/x", Path("weights/x")), ("false", None)):
        assert configs.load(QUICKSTART, [f"export={value}"]).config.export_folder == folder


def test_lists_of_names_agree_with_the_schema():
    assert get_args(configs.ObjectiveSection.model_fields["kind"].annotation) == ("sft", *enums.PAIR_LOSSES)
    assert tuple(configs.MeshShape.model_fields)[: len(enums.MESH_AXES)] == enums.MESH_AXES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_and_resolved_configs_fit_the_json_schema(path: Path):
    schema = configs.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    # PyYAML follows YAML 1.1, in which 1e-4 is a string
    text = re.sub(r"\b(\d+)e-(\d+)\b", r"\1.0e-\2", path.read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(text), schema)
    jsonschema.validate(configs.to_values(configs.load(path).config), schema)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"batch_size": 0}},
        {"train": {"stepz": 1}},
        {"train": {}},
        {"data": {"sources": []}},
        {"model": {"remat": "some"}},
        {"export": 3},
    ],
    ids=str,
)
def test_the_json_schema_refuses_what_load_refuses(change: dict[str, Any], tmp_path: Path, weights: Path):
    values = yaml.safe_load(write_first(tmp_path, weights).read_text())
    jsonschema.validate(values, configs.json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | change, configs.json_schema())


def test_the_json_schema_is_printed():
    done = subprocess.run([sys.executable, "-m", "xlam_jax.config"], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == configs.json_schema(), done.stderr
