"""Losses on pairs against TRL: the loss and the gradient of every weight, on the same model.

TRL comes with the extra `slow`. Both sides start from the same weights: TRL pads a batch of sides; we pack pairs into
rows and take a real step. TRL 1.16 no longer has kto_pair; it is computed with TRL's KTO trainer, called once per side
with the other side as the data on which the distance to the reference is estimated, as in the paper and in TRL's former
`kto_pair`.
"""
# pyright: reportMissingImports=false

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
import torch

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.params import Params, binder
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.training import step as steps
from xlam_jax.training.objectives import token_log_probabilities
from xlam_jax.training.preference import PER_TOKEN, Preference
from xlam_jax.weights.hf_map import parameter, tensors

pytestmark = [
    pytest.mark.slow,
    # caused by TRL's use of other packages, and of its own trainers under `experimental`
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental.:UserWarning"),
]

ROWS, LENGTH, PAIRS = 2, 96, 3
Side = tuple[np.ndarray, np.ndarray]
"""Tokens, and which of them are the answer."""


def sides() -> list[tuple[Side, Side]]:
    """Returns pairs of one prompt and two answers, all of different lengths. TRL's ORPO likelihood includes prompts, so
    a prompt is one token, which is never predicted."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(5):
        prompt = rng.integers(3, tiny_models.VOCAB, 1)
        answers = [rng.integers(3, tiny_models.VOCAB, rng.integers(4, 14)) for _ in range(2)]
        pairs.append(tuple((np.concatenate([prompt, answer]), np.arange(1 + len(answer)) >= 1) for answer in answers))
    return pairs


def packed(pairs: list[tuple[Side, Side]]) -> steps.Batch:
    """Returns our rows: three pairs and two pairs."""
    columns = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "labels", "positions", "segments")}
    weights_BT = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        at = 0
        for number, (tokens, answer) in enumerate(side for pair in pairs[row * PAIRS :][:PAIRS] for side in pair):
            here = slice(at, at := at + len(tokens))
            columns["tokens"][row, here] = tokens
            columns["labels"][row, here] = np.append(tokens[1:], 0)
            columns["positions"][row, here] = np.arange(len(tokens))
            columns["segments"][row, here] = number + 1
            weights_BT[row, here] = np.append(answer[1:], False)
    return steps.Batch(
        **{f"{name}_BT": jnp.asarray(column) for name, column in columns.items()}, weights_BT=jnp.asarray(weights_BT)
    )


def padded(some: list[Side]) -> dict[str, torch.Tensor]:
    """Returns TRL's batch of sides."""
    length = max(len(tokens) for tokens, _ in some)

    def stack(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int64))

    return {
        "input_ids": stack([tokens for tokens, _ in some]),
        "attention_mask": stack([np.ones(len(tokens)) for tokens, _ in some]),
        "completion_mask": stack([answer for _, answer in some]),
    }


def trainer(model: Any, reference: Any, **own: Any) -> Any:
    """Returns an object with the attributes that TRL's losses read from a trainer."""
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **own,
    )


def dpo(
    preference: Preference, model: Any, reference: Any, pairs: list[tuple[Side, Side]]
) -> tuple[torch.Tensor, dict]:
    from trl.trainer.dpo_trainer import DPOTrainer

    terms = {preference.kind: 1.0} | ({"sft": preference.sft_weight} if preference.sft_weight else {})
    it = trainer(
        model,
        reference,
        beta=preference.beta,
        loss_types=list(terms),
        loss_weights=list(terms.values()),
        label_smoothing=preference.label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    # one pair at a time: TRL's likelihood is a mean over the tokens of a batch, ours over those of each pair
    losses = [
        DPOTrainer._compute_loss(it, model, padded([chosen, rejected]), return_outputs=False)
        for chosen, rejected in pairs
    ]
    return torch.stack(losses).mean(), {name: np.mean(values) for name, values in it._metrics["eval"].items()}


def kto(
    preference: Preference, model: Any, reference: Any, pairs: list[tuple[Side, Side]]
) -> tuple[torch.Tensor, dict]:
    from trl.trainer.kto_trainer import KTOTrainer

    it = trainer(
        model,
        reference,
        beta=preference.beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    it._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(it, model, batch)
    losses = []
    for side, other, label in ((0, 1, True), (1, 0, False)):
        batch = padded([pair[side] for pair in pairs])
        estimated = {f"KL_{name}": value for name, value in padded([pair[other] for pair in pairs]).items()}
        batch |= estimated | {"label": torch.full((len(pairs),), label)}
        losses.append(KTOTrainer._compute_loss(it, model, batch, return_outputs=False))
    return torch.stack(losses).mean(), {}


def unreferenced(
    preference: Preference, model: Any, _: Any, pairs: list[tuple[Side, Side]]
) -> tuple[torch.Tensor, dict]:
    """Computes losses without a reference: CPO's trainer has SimPO and the smoothed sigmoid loss; ORPO has a separate
    trainer."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    kind: Any = ORPOTrainer if preference.kind == "orpo" else CPOTrainer
    it = trainer(
        model,
        None,
        beta=preference.beta,
        loss_type=preference.kind,
        label_smoothing=preference.label_smoothing,
        simpo_gamma=preference.margin,
        alpha=0.0,
        cpo_alpha=preference.sft_weight,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        concatenated_inputs=kind.concatenated_inputs,
        get_batch_logps=kind.get_batch_logps,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(it, name, getattr(kind, name).__get__(it))
    losses, metrics = [], defaultdict(list)
    for pair in pairs:
        batch = {}
        for name, side in zip(("chosen", "rejected"), pair, strict=True):
            one = padded([side])
            labels = one["input_ids"].masked_fill(one.pop("completion_mask") == 0, -100)
            batch |= {f"{name}_{key}": value for key, value in (one | {"labels": labels}).items()}
        loss, watched = kind.get_batch_loss_metrics(it, model, batch)
        losses.append(loss)
        for key, value in watched.items():
            metrics[key].append(value)
    return torch.stack(losses).mean(), {name: np.mean(values) for name, values in metrics.items()}


CASES = {
    "sigmoid": (dpo, Preference("sigmoid", 0.3)),
    "sigmoid-sft": (dpo, Preference("sigmoid", 0.1, sft_weight=0.5)),
    "sigmoid-smoothed": (unreferenced, Preference("sigmoid", 0.2, label_smoothing=0.2, sft_weight=0.3)),
    "hinge": (dpo, Preference("hinge", 0.2)),
    "hinge-sft": (dpo, Preference("hinge", 0.05, sft_weight=1.0)),
    "ipo": (dpo, Preference("ipo", 0.4)),
    "kto_pair": (kto, Preference("kto_pair", 0.3)),
    "simpo": (unreferenced, Preference("simpo", 2.0, margin=0.8)),
    "simpo-sft": (unreferenced, Preference("simpo", 2.5, margin=0.5, sft_weight=0.4)),
    "orpo": (unreferenced, Preference("orpo", 0.5)),
}
NAMES = {
    "rewards_chosen": "rewards/chosen",
    "rewards_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "log_p_chosen": "logps/chosen",
    "log_p_rejected": "logps/rejected",
}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        *((case, "mistral") for case in CASES),
        ("sigmoid", "mixtral"),
        *(pytest.param("sigmoid", family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "qwen3_moe")),
    ],
)
def test_losses_and_gradients_are_trls(case: str, family: str):
    trl_case, preference = CASES[case]
    model, reference = (tiny_models.hf_model(family, seed=seed) for seed in (0, 1))
    with torch.no_grad():  # close to the policy, like a real reference
        for value, other in zip(reference.parameters(), model.parameters(), strict=True):
            value.copy_(other + 0.1 * value)
    config, pairs = tiny_models.model_config(model), sides()
    batch = packed(pairs)
    if trl_case is not unreferenced:
        log_p_BT = jax.jit(partial(log_p, config))(tiny_models.params_of(reference), batch)
        batch = batch._replace(reference_BT=log_p_BT)
    before, after, metrics = ours(preference, config, tiny_models.params_of(model), batch)

    if trl_case is not unreferenced:
        from trl.trainer.utils import add_fused_lm_head

        for one in (model, reference):
            add_fused_lm_head(one, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    loss, watched = trl_case(preference, model, reference, pairs)
    loss.backward()
    gradients = tiny_models.file_tensors({name: one.grad for name, one in model.named_parameters()}, family)

    np.testing.assert_allclose(float(metrics["loss"]), float(loss.detach()), rtol=1e-5)
    for name, key in NAMES.items():
        # with IPO's loss TRL shows sums over tokens as rewards, with SimPO's and ORPO's means as log-probabilities
        if (
            key in watched
            and preference.kind != "ipo"
            and (preference.kind not in PER_TOKEN or not name.startswith("log_p"))
        ):
            np.testing.assert_allclose(float(metrics[name]), watched[key], rtol=1e-5, atol=1e-5, err_msg=name)
    largest = max(np.abs(value).max() for value in gradients.values())
    for tensor in tensors(config):
        step = parameter(before, tensor.path) - parameter(after, tensor.path)
        error = np.abs(tensor.to_hf(step) - gradients[tensor.key]).max()
        assert error <= 1e-5 * largest, f"{tensor.key}: off by {error:.3g} at a scale of {largest:.3g}"


def log_p(config: ModelConfig, params: Params, batch: steps.Batch) -> jax.Array:
    """Returns log p of each label that counts."""
    model = binder(config, dtype=jnp.float32)(params)
    hidden_BTD, *_ = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    return token_log_probabilities(hidden_BTD, model.head_VD(), batch.labels_BT, batch.weights_BT != 0)[0]


def ours(
    preference: Preference, config: ModelConfig, params: Params, batch: steps.Batch
) -> tuple[Params, Params, dict]:
    """Returns the weights before and after a step that subtracts the gradient, and its metrics."""
    mesh, tx = make_mesh({}, jax.devices()[:1]), optax.sgd(1.0)
    step = steps.make_train_step(
        config,
        tx,
        mesh,
        steps.StepOptions(
            compute_dtype=jnp.float32,
            remat="none",
            microbatches=1,
            router_aux_weight=0.0,
            objective=steps.Objective(preference, pairs=PAIRS),
        ),
    )
    state, metrics = jax.jit(step)(steps.init_state(steps.abstract_state(config, tx, mesh), tx, params), {}, batch)
    return params, jax.device_get(state.params), metrics
