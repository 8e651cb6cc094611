"""Weights are converted to Orbax and back bit for bit; each mismatch is reported in one message."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from converters import hf_to_orbax, inspect, orbax_to_hf
from xlam_jax.errors import UserError
from xlam_jax.models.params import shapes
from xlam_jax.weights import locate
from xlam_jax.weights.hf import load_hf
from xlam_jax.weights.hf_map import tensors
from xlam_jax.weights.shards import Shard

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"head_dim": 24}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "llama": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0}}),
    "ministral3": ("ministral3", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
}
Command = Callable[..., None]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a converter as its command line would."""

    def convert(module: Any, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return convert


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Reads dtype, shape and bytes of all tensors in a folder's safetensors files."""
    contents = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            for key in opened.keys():  # noqa: SIM118 (safe_open has no iterator)
                assert key not in contents
                value = opened.get_tensor(key)
                contents[key] = (str(value.dtype), value.shape, value.tobytes())
    return contents


def saved(path: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    family, overrides = FAMILIES[name]
    tiny_models.hf_model(family, **overrides).to(dtype).save_pretrained(path, **options)
    return path


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path, convert: Command):
    original = saved(tmp_path / "hf", name, dtype, max_shard_size="20KB")
    (original / "tokenizer.json").write_text("{}")
    (original / "chat_template.jinja").write_text("{{ messages }}")
    convert(hf_to_orbax, "--hf", original, "--out", tmp_path / "orbax")
    convert(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back", "--max-shard-size", "30KB")
    back = tmp_path / "back"

    assert stored(back) == stored(original)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert {key: (back / file).is_file() for key, file in index["weight_map"].items()} == dict.fromkeys(
        stored(original), True
    )
    assert index["metadata"] == json.loads((original / "model.safetensors.index.json").read_text())["metadata"]
    assert json.loads((back / "config.json").read_text()) == json.loads((original / "config.json").read_text())
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (back / file).read_bytes() == (original / file).read_bytes()
    assert not list(tmp_path.glob(".*")), "no temporary folder stays"

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (original, back))
    tokens = torch.from_numpy(tiny_models.tokens(2, 9)).long()
    with torch.no_grad():
        assert after.dtype == dtype
        assert torch.equal(after(tokens).logits, before(tokens).logits)


def test_one_file_when_it_fits(tmp_path: Path, convert: Command):
    original = saved(tmp_path / "hf", "mistral")
    convert(hf_to_orbax, "--hf", original, "--out", tmp_path / "orbax")
    convert(orbax_to_hf, "--checkpoint", tmp_path / "orbax" / "checkpoints" / "0", "--out", tmp_path / "back")
    assert stored(tmp_path / "back") == stored(original)
    assert {file.name for file in (tmp_path / "back").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    modes = {file.stat().st_mode for file in (tmp_path / "back").iterdir()}
    assert len(modes) == 1, "whoever can read config.json can read the weights"


def test_export_in_another_dtype(tmp_path: Path, convert: Command):
    convert(hf_to_orbax, "--hf", saved(tmp_path / "hf", "mixtral"), "--out", tmp_path / "orbax")
    convert(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back", "--dtype", "bfloat16")
    expected = saved(tmp_path / "expected", "mixtral", torch.bfloat16)
    assert stored(tmp_path / "back") == stored(expected), "rounded as PyTorch rounds"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_covers_the_model(name: str):
    family, overrides = FAMILIES[name]
    config = tiny_models.model_config(tiny_models.hf_model(family, **overrides))
    expected = {
        tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(config))
    }
    assert {tensor.path: tensor.stacked_shape for tensor in tensors(config)} == expected
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(config)) == config.parameters()


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path):
    folder = saved(tmp_path / "hf", "llama")
    file = folder / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(load_file(file) | buffer, file)
    load_hf(folder)


def test_weights_in_another_dtype_on_request(tmp_path: Path):
    _, params = load_hf(saved(tmp_path / "hf", "mistral", torch.bfloat16), dtype=np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00008.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00008.safetensors").unlink()


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = folder / "model-00007-of-00008.safetensors"
    values = load_file(file)
    change(values)
    save_file(values, file)


def break_all(folder: Path) -> None:
    """Makes one tensor missing, one extra, one of another shape, and one duplicate."""

    def change(values: dict[str, np.ndarray]) -> None:
        values["model.layers.9.mlp.gate_proj.weight"] = values.pop("model.layers.1.mlp.gate_proj.weight")
        values["model.norm.weight"] = np.ones(31, np.float32)
        values["model.embed_tokens.weight"] = np.ones((97, 32), np.float32)

    edit(folder, change)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("weights") / "hf", "mistral", max_shard_size="24KB")
    assert (folder / "model-00007-of-00008.safetensors").is_file()
    return folder


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ["model-00002-of-00008.safetensors: truncated", "bytes", "download this file again"]),
        (remove_shard, ["model.safetensors.index.json: lists 8 shards, of which 1", "model-00002-of-00008"]),
        (
            break_all,
            [
                "4 tensor(s) differ",
                "model.layers.1.mlp.gate_proj.weight is missing",
                "model.layers.9.mlp.gate_proj.weight in model-00007-of-00008.safetensors is not part of this model",
                "model.norm.weight has shape (31,), config.json means (32,)",
                "model.embed_tokens.weight is in model-00001-of-00008.safetensors and in model-00007",
            ],
        ),
        (
            lambda folder: set_config(folder, num_key_value_heads=4),
            ["self_attn.k_proj.weight has shape (48, 32), config.json means (96, 32)"],
        ),
        (
            lambda folder: set_config(folder, architectures=["GemmaForCausalLM"]),
            ["config.json: architectures is ['GemmaForCausalLM']; this project trains MistralForCausalLM"],
        ),
        (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            ["neither model.safetensors nor model.safetensors.index.json", "it contains model-00001"],
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), ["no weight_map"]),
        (
            lambda folder: edit(folder, lambda values: values.update({"model.norm.weight": np.ones(32, np.int8)})),
            ["model.norm.weight is I8; quantized"],
        ),
    ],
    ids=["truncated", "no-shard", "all", "shape", "foreign", "no-config", "no-index", "bad-index", "quantized"],
)
def test_invalid_folders_are_refused(
    sharded: Path, tmp_path: Path, convert: Command, damage: Callable[[Path], object], expected: list[str]
):
    folder = tmp_path / "hf"
    shutil.copytree(sharded, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        convert(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax")
    for part in expected:
        assert part in str(error.value)
    assert not (tmp_path / "orbax").exists()


def reindex(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def swap_offsets(folder: Path) -> None:
    """Gives two tensors of the same shape the same bytes."""
    path = folder / "model-00002-of-00008.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = list(key for key in header if key != "__metadata__")[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (swap_offsets, "model-00002-of-00008.safetensors: truncated or damaged"),
        (
            lambda folder: reindex(folder, lambda files: files.update({NORM: "../x.safetensors"})),
            "names '../x.safetens",
        ),
        (lambda folder: reindex(folder, lambda files: files.update({NORM: "/etc/passwd"})), "names '/etc/passwd' for"),
        (lambda folder: reindex(folder, lambda files: files.update({NORM: 3})), f"names 3 for {NORM}"),
        (
            lambda folder: reindex(folder, lambda files: files.update({NORM: "model-00001-of-00008.safetensors"})),
            "and model.safetensors.index.json names model-00001-of-00008.safetensors for it",
        ),
        (lambda folder: reindex(folder, lambda files: files.pop(NORM)), "index.json names no file for it"),
        (
            lambda folder: reindex(folder, lambda files: files.update({"x": files[NORM]})),
            "x is not in model-0000",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "b"}}'),
            "index.json: not valid JSON (the key 'a' occurs twice)",
        ),
        (
            lambda folder: shutil.copyfile(folder / "model-00001-of-00008.safetensors", folder / "model.safetensors"),
            "contains both model.safetensors and model.safetensors.index.json",
        ),
        (
            lambda folder: edit(folder, lambda values: values.update({"model.layers.0.up.qweight": np.ones(3)})),
            "model.layers.0.up.qweight is F64; quantized weights are not read",
        ),
        (
            lambda folder: (
                edit(folder, lambda values: values.update({NORM: np.ones(32, np.uint8)})),
                set_config(folder, quantization_config={"quant_method": "bitsandbytes"}),
            ),
            f"{NORM} is U8; quantized weights are not read (config.json: quantization bitsandbytes)",
        ),
    ],
)
def test_contradictions_of_files_and_index(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
):
    folder = tmp_path / "hf"
    shutil.copytree(sharded, folder)
    damage(folder)
    for read in (load_hf, lambda folder: inspect.inspect_hf(str(folder))):
        with pytest.raises(UserError) as error:
            read(folder)
        assert expected in str(error.value)


def test_a_quantization_config_without_quantized_weights_is_dropped(
    tmp_path: Path, convert: Command, capsys: pytest.CaptureFixture[str]
):
    original = saved(tmp_path / "hf", "mistral")
    set_config(original, quantization_config={"quant_method": "bitsandbytes"}, attention_dropout=0.25)
    convert(hf_to_orbax, "--hf", original, "--out", tmp_path / "orbax")
    error = capsys.readouterr().err
    assert "quantization_config (bitsandbytes) is dropped; the weights are not quantized" in error
    assert "attention_dropout is 0.25, which transformers applies in training" in error
    assert "quantization_config (bitsandbytes) is dropped" in inspect.inspect_hf(str(original))["warnings"]
    convert(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_tied_model_with_its_head_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locate, "ROWS", 100)
    folder = saved(tmp_path / "hf", "mistral-tied")
    file = folder / "model.safetensors"
    values = load_file(file)
    save_file(values | {"lm_head.weight": values["model.embed_tokens.weight"].copy()}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = AutoModelForCausalLM.from_pretrained(folder)
    _, params = load_hf(folder)
    assert "head" not in params
    np.testing.assert_array_equal(params["embedding"], expected.lm_head.weight.detach().numpy())

    other = values["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    for head in (other, other[:-1]):
        save_file(values | {"lm_head.weight": head}, file)
        with pytest.raises(UserError, match=r"tie_word_embeddings is true .* not equal to model\.embed"):
            load_hf(folder)
    save_file(values | {"lm_head.weight": other}, file)
    set_config(folder, tie_word_embeddings=False)
    np.testing.assert_array_equal(load_hf(folder)[1]["head"], other)


def test_an_existing_output_is_refused(sharded: Path, tmp_path: Path, convert: Command):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("kept")
    for module, source in [(hf_to_orbax, "--hf"), (orbax_to_hf, "--checkpoint")]:
        with pytest.raises(UserError, match="there: exists already"):
            convert(module, source, sharded, "--out", tmp_path / "there")
    assert (tmp_path / "there" / "precious").read_text() == "kept"


def test_export_of_a_folder_without_checkpoints(tmp_path: Path, convert: Command):
    with pytest.raises(UserError, match="checkpoints"):
        convert(orbax_to_hf, "--checkpoint", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_size_without_a_unit_is_refused(tmp_path: Path, convert: Command, capsys: Any):
    with pytest.raises(SystemExit, match="2"):
        convert(orbax_to_hf, "--checkpoint", tmp_path, "--out", tmp_path / "out", "--max-shard-size", "many")
    assert "'many' is not a size; write it like 5GB" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "base_model.model.", "module.", "model."])
def test_names_of_wrappers_are_removed(wrapper: str, tmp_path: Path):
    folder = saved(tmp_path / "hf", "mistral")
    values = load_file(folder / "model.safetensors")
    expected = load_hf(folder)[1]
    save_file({wrapper + key: value for key, value in values.items()}, folder / "model.safetensors")
    opened = hf_to_orbax.HFWeights(folder)
    assert any("have the prefix of a wrapper" in line for line in opened.warnings)
    np.testing.assert_array_equal(load_hf(folder)[1]["blocks"]["q"], expected["blocks"]["q"])


def test_names_of_wrappers_inside_and_twice(tmp_path: Path):
    folder = saved(tmp_path / "hf", "mistral")
    values = load_file(folder / "model.safetensors")
    expected = load_hf(folder)[1]["blocks"]["w1"]
    inside = {key.replace(".mlp.", "._orig_mod.mlp."): value for key, value in values.items()}
    save_file(inside, folder / "model.safetensors")
    np.testing.assert_array_equal(load_hf(folder)[1]["blocks"]["w1"], expected)
    save_file(inside | {"_orig_mod.model.norm.weight": values["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"_orig_mod\.model\.norm\.weight.* model\.norm\.weight without the names|both"):
        load_hf(folder)


def test_adapters_that_are_not_merged_are_named(tmp_path: Path):
    folder = saved(tmp_path / "hf", "mistral")
    values = load_file(folder / "model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    changed = {f"base_model.model.{name}": value for name, value in values.items()}
    save_file(changed | {key: np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lora_A\.default\.weight belongs to an adapter that is not merged"):
        load_hf(folder)


def test_layers_of_several_dtypes_are_read_in_the_wider_one(tmp_path: Path, convert: Command):
    folder = saved(tmp_path / "hf", "mistral")
    values = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(values | {key: values[key].astype(np.float16)}, folder / "model.safetensors")
    q = load_hf(folder)[1]["blocks"]["q"]
    assert q.dtype == np.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.model.layers[0].self_attn.q_proj.weight
    np.testing.assert_array_equal(q[0].reshape(q.shape[1], -1).T, expected.detach().numpy())
    convert(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax", "--verify")


def test_swish_is_silu(tmp_path: Path, convert: Command):
    folder = saved(tmp_path / "hf", "mistral")
    set_config(folder, hidden_act="swish")
    convert(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax", "--verify")
    convert(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back")
    assert (
        json.loads((tmp_path / "back/config.json").read_text())["hidden_act"] == "silu"
    )  # the only name that vLLM supports


def test_finished_tensors_are_kept_when_a_read_fails(tmp_path: Path, convert: Command, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "hf", "mistral")
    read = Shard.read
    keys: list[str] = []

    def failing(shard: Any, key: str, part: Any = None) -> Any:
        if "layers.1" in key:
            monkeypatch.setattr(shard, "_files", None)

            class Broken:
                def cat_file(self, *_: object) -> bytes:
                    raise OSError(5, "Input/output error")

            shard._files = Broken()
        keys.append(key)
        return read(shard, key, part)

    monkeypatch.setattr(Shard, "read", failing)
    with pytest.raises(UserError, match=r"model\.safetensors: .* can't be read \(Input/output error\); run again"):
        convert(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax", "--workers", "1")
    monkeypatch.setattr(Shard, "read", lambda *arguments: (keys.append(arguments[1]), read(*arguments))[1])
    keys.clear()
    convert(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax")
    assert keys
    assert "model.embed_tokens.weight" not in keys


def test_addresses_as_outputs(tmp_path: Path, convert: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "hf", "mistral")
    with pytest.raises(UserError, match="gs://bucket/a: an address, and this output is written to a local folder"):
        convert(hf_to_orbax, "--hf", folder, "--out", "gs://bucket/a")
    convert(hf_to_orbax, "--hf", folder, "--out", "orbax")
    for address in ("gs://bucket/a", "nothing://bucket/a"):
        with pytest.raises(UserError, match=f"{address}: can't be written"):
            convert(orbax_to_hf, "--checkpoint", "orbax", "--out", address)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "orbax"]
