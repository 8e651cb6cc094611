"""Compares the training of the demo with TRL and peft: the loss of each step, held-out loss, exact calls, and speed.

Both start from the same weights and the same adapters (peft's), and take the same packed batches in the same order,
with the same learning rates, AdamW, clipping and precision (float32). TRL gets the packed rows with positions that
start again in each sequence, from which transformers derives the same attention. `make demo` installs the model.

python -m benchmarks.demo_peer --requests 200
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from examples.demo import answer
from xlam_jax import config as configs
from xlam_jax.cli import positive, run
from xlam_jax.config import Resolved
from xlam_jax.data import corpus, pipeline
from xlam_jax.data.tokenizer import open_tokenizer
from xlam_jax.errors import UserError
from xlam_jax.evaluate import next_call
from xlam_jax.generate import find_model

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/demo.yaml"
IGNORED = -100
"""Label of positions without a loss in transformers."""


class Trained(NamedTuple):
    """The result of a training."""

    losses: list[float]
    """Of each step."""
    heldout: float
    tokens_per_second: float
    """Median over the steps after the first."""


def call(module: str, *arguments: object) -> None:
    """Runs a command of this project. Raises `UserError` if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{module} failed; its message is above")


def write_base(resolved: Resolved, out: Path) -> Path:
    """Writes the demo's base as a Hugging Face folder, which transformers and peft can also save again."""
    if not (out / "base").exists():
        call("converters.hf_to_orbax", "--hf", resolved.config.model.init_from, "--out", out / "base-orbax")
        call("converters.orbax_to_hf", "--checkpoint", out / "base-orbax", "--out", out / "base")
    return out / "base"


def peft_model(base: Path, resolved: Resolved) -> Any:
    """Returns the base with new adapters of peft."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(resolved.config.seed)
    lora = resolved.config.lora
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=0.0,
        target_modules=[weight.short_module for weight in resolved.model.weights if weight.name in lora.targets],
    )
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)


def train_ours(overrides: list[str], run_dir: Path, initial: Path) -> Trained:
    """Trains with this project, from the adapters in `initial`."""
    call("xlam_jax.train", "--config", CONFIG, f"output_dir={run_dir}", f"lora.init_from={initial}", *overrides)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    last = [record for record in records if record["kind"] == "heldout"][-1]
    speeds = [step["tokens_per_second"] for step in steps[1:]]
    return Trained([step["loss"] for step in steps], last["loss"], median(speeds))


def learning_rates(run_dir: Path) -> list[float]:
    """Returns the learning rate of each step of a run."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["learning_rate"] for record in map(json.loads, lines) if record["kind"] == "train"]


def hf_rows(batches: Iterator[pipeline.Row]) -> Iterator[dict[str, Any]]:
    """Yields the rows of batches as transformers expects them: a label is at the position of its own token."""
    for batch in batches:
        for tokens, labels, weights, positions in zip(
            batch.tokens, batch.labels, batch.weights, batch.positions, strict=True
        ):
            shifted = np.full(len(tokens), IGNORED, np.int64)
            shifted[1:] = np.where(weights > 0, labels, IGNORED)[:-1]
            yield {"input_ids": tokens.tolist(), "labels": shifted.tolist(), "position_ids": positions.tolist()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks rows of equal length."""
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def train_trl(resolved: Resolved, model: Any, rates: list[float], out: Path) -> Trained:
    """Trains with TRL's SFTTrainer, which changes `model`. `rates`: the learning rate of each step."""
    import datasets
    import torch
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config, train = resolved.config, resolved.config.train
    tokenizer = open_tokenizer(config.data)
    loaded = corpus.load(config.data, tokenizer, print)
    loader = pipeline.Loader(loaded, config.data, batch_size=train.batch_size, seed=config.seed, tokenizer=tokenizer)
    rows = list(hf_rows(next(loader) for _ in rates))
    options = SFTConfig(
        output_dir=str(out), max_steps=len(rates), per_device_train_batch_size=train.batch_size, logging_steps=1,
        max_grad_norm=train.clip_norm, max_length=None, remove_unused_columns=False, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", seed=config.seed, gradient_checkpointing=False, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=train.learning_rate,
        betas=(train.beta1, train.beta2), eps=train.epsilon, weight_decay=train.weight_decay,
    )  # fmt: skip
    factors = [rate / train.learning_rate for rate in (*rates, 0.0)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)

    class InOrder(SFTTrainer):
        """Takes the rows in their order."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    class Clock(transformers.TrainerCallback):
        """Measures the seconds of each step."""

        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(perf_counter() - self.start)

    clock = Clock()
    trainer = InOrder(
        model=model, args=options, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        data_collator=collate, optimizers=(optimizer, schedule), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    places = train.batch_size * config.data.sequence_length
    return Trained(losses, heldout_loss(resolved, loaded, model), places / median(clock.seconds[1:]))


def heldout_loss(resolved: Resolved, loaded: Any, model: Any) -> float:
    """Returns a torch model's mean loss per token on the batches on which our runs are evaluated."""
    import torch

    config, total, count = resolved.config, 0.0, 0
    batches = pipeline.heldout_batches(loaded, config.data, rows=config.train.batch_size, limit=config.eval.batches)
    model.eval()
    for row in hf_rows(batches):
        tensors = collate([row])
        tokens = int((tensors["labels"] != IGNORED).sum())
        with torch.no_grad():
            total += float(model(**tensors).loss) * tokens if tokens else 0.0
        count += tokens
    return total / count


def exact_calls(resolved: Resolved, folder: Path, count: int) -> dict[str, float]:
    """Returns the marks of a model's answers to held-out requests."""
    model, format = find_model(folder), resolved.config.data.format
    requests = next_call.requests(answer.heldout(resolved.config))
    prompts = next_call.prompts(requests, model.tokenizer, format, longest=answer.LONGEST, count=count)
    scored = answer.answers(model, prompts.prompted, model, format)
    return next_call.summarize([item.score for item in scored])


def report(results: dict[str, Trained], marks: dict[str, dict[str, float]]) -> None:
    """Prints the tables, and our ratios to TRL."""
    ours, peer = results["ours"], results["trl"]
    print(f"\n{'step':>6}{'ours':>10}{'TRL':>10}")
    for step, losses in enumerate(zip(ours.losses, peer.losses, strict=True), 1):
        print(f"{step:6}" + "".join(f"{loss:10.4f}" for loss in losses))
    differences = [abs(a - b) / b for a, b in zip(ours.losses, peer.losses, strict=True)]
    print(f"\nlosses of the steps differ by {mean(differences):.2%} on average, {max(differences):.2%} at most")
    for name, result in results.items():
        shares = ", ".join(f"{key.replace('_', ' ')} {share:.1%}" for key, share in marks[name].items() if share <= 1)
        print(f"{name:5} held-out loss {result.heldout:.4f}, {result.tokens_per_second:.0f} tokens/s; {shares}")
    print(
        f"ours / TRL: held-out loss {ours.heldout / peer.heldout:.4f}, "
        f"tokens per second {ours.tokens_per_second / peer.tokens_per_second:.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares the demo's training with TRL and peft.")
    parser.add_argument("--requests", type=positive, default=200, help="held-out requests to answer (default: 200)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo/peer", help="folder for both runs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of configs/demo.yaml")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    resolved = configs.load(CONFIG, arguments.overrides)
    base = write_base(resolved, out)
    model = peft_model(base, resolved)
    model.save_pretrained(out / "initial")
    ours = train_ours(arguments.overrides, out / "ours", out / "initial")
    peer = train_trl(resolved, model, learning_rates(out / "ours"), out / "trl")
    if not (out / "ours/hf").exists():
        call("converters.orbax_to_hf", "--checkpoint", out / "ours", "--out", out / "ours/hf")
    model.merge_and_unload().save_pretrained(out / "trl/hf")
    find_model(out / "ours/hf").tokenizer.save_pretrained(out / "trl/hf")
    marks = {name: exact_calls(resolved, out / name / "hf", arguments.requests) for name in ("ours", "trl")}
    results = {"ours": ours, "trl": peer}
    report(results, marks)
    record = {name: {**results[name]._asdict(), **marks[name]} for name in results}
    (out / "comparison.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
