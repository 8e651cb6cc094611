"""`python -m xlam_jax.train --config configs/NAME.yaml [section.key=value …]`: a training run, from config to weights.

Running the same command again continues the run that its output_dir holds.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from xlam_jax import config as configs
from xlam_jax import errors
from xlam_jax.config import Resolved
from xlam_jax.errors import UserError

CONFIG = "config.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m xlam_jax.train",
        description="Train a model as a config says; run again to continue.",
        epilog="fields of a config:\n" + configs.field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and where it comes from")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set")
    arguments = parser.parse_intermixed_args()
    resolved = configs.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(configs.describe(resolved))
        return 0
    run = Path(resolved.config.output_dir)
    check_run_folder(run, resolved)
    with_huge_pages()
    return train(resolved, run)


def check_run_folder(run: Path, resolved: Resolved) -> None:
    """Raises `UserError` when the folder holds another run, or something that is no run at all."""
    import yaml

    from xlam_jax.models.config import read_hf_config

    saved = run / CONFIG
    if not saved.exists():
        if run.exists() and (not run.is_dir() or any(entry.suffix != ".part" for entry in run.iterdir())):
            raise UserError(f"output_dir: {run} exists and is not a run of this program; choose another folder")
        return
    old = configs.Config.model_validate(yaml.safe_load(saved.read_text(encoding="utf-8")))
    different = configs.differences(old, resolved.config)
    new_hf = resolved.hf_config
    old_hf = read_hf_config(run / "config.json") if (run / "config.json").exists() else new_hf  # killed before it wrote
    different += [
        f"{resolved.config.model.config}: {key} is {old_hf.get(key)!r} in the run, {new_hf.get(key)!r} now"
        for key in sorted(old_hf.keys() | new_hf.keys())
        if old_hf.get(key) != new_hf.get(key)
    ]
    if different:
        raise UserError(
            f"output_dir: {run} holds a run of another config; choose another folder, or set back\n  "
            + "\n  ".join(sorted(different))
        )


def with_huge_pages() -> None:
    """Starts this program again with transparent huge pages for malloc, which the C library reads only at start.

    XLA on a CPU takes fresh memory each step; faulting it in by small pages costs up to a third of the step.
    """
    tunable = "glibc.malloc.hugetlb=1"
    present = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in present:
        os.environ["GLIBC_TUNABLES"] = f"{present}:{tunable}" if present else tunable
        os.execv(sys.executable, sys.orig_argv)


class Stop:
    """Set by SIGTERM: the run saves and ends after the step at hand."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def train(resolved: Resolved, run: Path) -> int:
    """The whole run, in the order in which things happen."""
    config = resolved.config
    stop = Stop()

    # ---- data: before any device is touched, so that a bad row costs seconds ------------------------------------
    from xlam_jax.data import corpus, pipeline
    from xlam_jax.data.tokenizer import load_tokenizer, save
    from xlam_jax.training.metrics import Metrics, Progress, duration, plot

    progress = Progress()
    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > resolved.model.vocab_size:
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} has {len(tokenizer)} tokens, more than the model's vocab_size, "
            f"{resolved.model.vocab_size}; use the model's own tokenizer, or a model with a larger vocabulary"
        )
    loaded = corpus.load(config.data, tokenizer, progress.line)

    # ---- devices --------------------------------------------------------------------------------------------------
    import jax
    import jax.numpy as jnp
    import numpy as np

    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)

    from xlam_jax.parallel.hosts import merged
    from xlam_jax.parallel.mesh import batch_spec, make_mesh
    from xlam_jax.training import checkpoint, weights
    from xlam_jax.training import step as steps
    from xlam_jax.training.optimizer import optimizer, schedule

    mesh = make_mesh({"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor})
    configs.check_divisible(config, resolved.model, {f"mesh.{axis}": size for axis, size in mesh.shape.items()})
    dtype = jnp.dtype(config.model.compute_dtype)
    quantized = config.train.trainable == "qlora"
    progress.line(
        f"{resolved.model.parameters():,} parameters on {len(jax.devices())} {jax.default_backend()} device(s): "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )

    tx = optimizer(config.train, resolved.model)
    abstract = steps.abstract_state(resolved.model, tx, mesh)
    abstract_frozen = steps.abstract_frozen(resolved.model, mesh, dtype=dtype, quantized=quantized)
    resumes = checkpoint.is_checkpoint(run)
    # read before the run folder is touched: the weights may be missing, or another model's
    base = weights.read_base(resolved) if abstract_frozen or not resumes else None
    given = weights.read_adapters(resolved) if resolved.model.lora else base
    frozen = weights.frozen(resolved, base, abstract_frozen, dtype)
    beside = weights.fingerprint(frozen) if frozen else None

    # ---- the run folder -------------------------------------------------------------------------------------------
    # The config first: it says whose folder this is, should the run be killed before the rest is written.
    run.mkdir(parents=True, exist_ok=True)
    (run / f"{CONFIG}.part").write_text(configs.to_yaml(config), encoding="utf-8")
    (run / f"{CONFIG}.part").replace(run / CONFIG)
    checkpoint.write_hf_config(run, resolved.hf_config)
    if not (run / checkpoint.TOKENIZER).exists():
        save(tokenizer, run / f"{checkpoint.TOKENIZER}.part", config.data.format)
        (run / f"{checkpoint.TOKENIZER}.part").replace(run / checkpoint.TOKENIZER)

    # ---- state: 1. this run's newest checkpoint; 2. model.init_from; 3. random -------------------------------------
    hosts: dict[str, int] = {"host": jax.process_index(), "hosts": jax.process_count()}
    loader = pipeline.Loader(
        loaded, config.data, batch_size=config.train.batch_size, seed=config.seed, tokenizer=tokenizer, **hosts
    )
    saves = checkpoint.Checkpoints(
        run,
        keep=config.checkpoint.keep,
        metadata={"config": config.model_dump(mode="json"), "model": resolved.hf_config, "base": beside},
    )
    start = saves.latest() or 0
    if start:
        weights.check_base(run, saves.saved_metadata(start).get("base"), beside or "", config.model.init_from)
        params, opt, data_state = saves.restore(start, abstract.params, abstract.opt)
        state = steps.State(params, opt, jax.device_put(np.int32(start), abstract.step.sharding))
        loader.restore(data_state)
        progress.line(f"continuing {run} after step {start}")
    else:
        state = steps.init_state(abstract, tx, weights.fresh(resolved, given, abstract.params))
        progress.line(f"weights from {config.model.init_from or 'the seed'}")
    del base, given
    if start >= config.train.steps:
        progress.line(f"{run} is finished: {start} of {config.train.steps} steps")
        return 0

    # ---- compile: once --------------------------------------------------------------------------------------------
    placed = jax.sharding.NamedSharding(mesh, batch_spec(mesh))

    def place(rows: pipeline.Row) -> steps.Batch:
        return steps.Batch(*(jax.make_array_from_process_local_data(placed, column) for column in rows))

    train_step = steps.make_train_step(
        resolved.model,
        tx,
        mesh,
        compute_dtype=dtype,
        remat=config.model.remat,
        microbatches=config.train.microbatches,
        router_aux_weight=config.train.router_aux_weight,
        z_loss=config.train.z_loss,
        neftune=config.train.neftune,
        quantized=quantized,
        seed=config.seed,
    )
    batch = place(next(loader))
    began = time.monotonic()
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch).compile()
    progress.line(f"compiled the step in {time.monotonic() - began:.1f} s")
    eval_step = jax.jit(steps.make_eval_step(resolved.model, mesh, compute_dtype=dtype, quantized=quantized))
    rate = schedule(config.train)
    metrics = Metrics(run, start=start, steps=config.train.steps, progress=progress, log_every=config.train.log_every)
    places = config.train.batch_size * config.data.sequence_length

    def evaluate(step: int) -> None:
        rows = config.train.batch_size // config.train.microbatches
        batches = pipeline.heldout_batches(loaded, config.data, rows=rows, limit=config.eval.batches, **hosts)
        sums = [eval_step(state.params, frozen, place(rows)) for rows in batches]
        if sums:
            total = steps.means(jax.tree.map(lambda *parts: sum(parts), *sums))
            metrics.heldout(step, {name: float(value) for name, value in total.items()})

    def log(step: int, values: dict[str, Any]) -> None:
        learning_rate = float(np.asarray(rate(step - 1)))
        named = {name: float(value) for name, value in values.items()} | {"learning_rate": learning_rate}
        metrics.step(step, named, places=places)

    # ---- the loop -------------------------------------------------------------------------------------------------
    paused = time.monotonic()
    if not start:
        evaluate(0)
    metrics.exclude(time.monotonic() - paused)
    last: tuple[int, dict[str, Any]] | None = None
    step = start
    for step in range(start + 1, config.train.steps + 1):
        state, values = compiled(state, frozen, batch)
        if last:  # the step before, while this one runs
            log(*last)
        last = (step, values)
        ends = step == config.train.steps or stop.asked
        save_now, eval_now = ends or step % config.checkpoint.every == 0, ends or step % config.eval.every == 0
        if save_now or eval_now:
            log(*last)
            last, paused = None, time.monotonic()
            if eval_now:
                evaluate(step)
            if save_now:
                saves.save(step, state.params, state.opt, merged(loader.state()))
            metrics.exclude(time.monotonic() - paused)
        if ends:
            break
        batch = place(next(loader))
    saves.wait()
    saves.close()
    metrics.close()
    progress.line(f"loss plot: {plot(run)}")
    if step < config.train.steps:
        progress.line(f"stopped by SIGTERM after step {step}, saved; run the same command to continue")
    else:
        progress.line(
            f"finished {step} steps in {duration(time.monotonic() - began)}; checkpoint: {checkpoint.resolve(run)}"
        )
    return 0


if __name__ == "__main__":
    errors.run(main)
