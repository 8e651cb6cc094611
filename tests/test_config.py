"""The schema: origins, overrides, and messages for wrong values."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.errors import UserError

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
    ],
)
def test_presets_have_the_published_sizes(preset: str, billions: float):
    path = ROOT / f"configs/models/{preset}.json"
    model = configs.ModelConfig.from_hf(configs.read_hf_config(path))
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
        (["mesh.fsdp=3"], "train.batch_size is"),
        (["mesh.fsdp=1", "mesh.tensor=4"], "num_key_value_heads is 2, which mesh.tensor, 4, does not divide"),
        (["train.warmup_steps=99999"], "train.warmup_steps is 99999, not less than train.steps"),
        (["train.end_learning_rate=1"], "train.end_learning_rate is 1"),
        (["data.streams=3", "train.batch_size=4"], "train.batch_size is 4 and data.streams is 3"),
        (["data.sequence_length=1000000"], "data.sequence_length is 1000000, more than the model's"),
        (["model.overrides.num_attention_heads=3"], "num_attention_heads is 3 and num_key_value_heads is 2"),
        (["model.overrides.architectures=[GPT2LMHeadModel]"], "MixtralForCausalLM"),
        (["model.overrides.rope_scaling={rope_type: yarn, factor: 2}"], "'yarn' is not implemented"),
        (["model.overrides.num_hiden_layers=1"], "no such key; did you mean 'num_hidden_layers'?"),
        (["model.overrides.rope_theta=.nan"], "rope_theta is nan; a number above 0 is needed"),
        (["model.overrides.rms_norm_eps=-5"], "with model.overrides: rms_norm_eps is -5; a decimal number above 0"),
        (["model.overrides.tie_word_embeddings='false'"], "tie_word_embeddings is 'false'; true or false is needed"),
        (["model.overrides.vocab_size=null"], "vocab_size is None; a positive whole number"),
        (["model.overrides.sliding_window=0"], "sliding_window is 0; a positive whole number"),
        (["model.overrides.bos_token_id=2020-01-01"], "bos_token_id is '2020-01-01'; a token's number is needed"),
        (["model.config=nowhere.json"], "nowhere.json: no such file"),
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
    resolved = configs.load(QUICKSTART, [f"model.config={path}", "model.overrides.rope_theta=5e6"])
    assert resolved.model.rope_theta == 5e6
    assert resolved.hf_config["rope_parameters"]["rope_theta"] == 5e6
    assert "quantization_config" not in resolved.hf_config
    assert resolved.warnings == (
        f"{path}: quantization_config (fp8) is dropped; the weights are not quantized",
        f"{path}: router_jitter_noise is 0.1, which transformers applies in training and this project does not",
        f"{path}: router_aux_loss_coef is 0.5; train.router_aux_weight, 0.02, is used",
    )
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
