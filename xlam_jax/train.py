"""`python -m xlam_jax.train --config configs/NAME.yaml [section.key=value …]`: a training run, from config to weights.

Running the same command again continues the run that its output_dir holds.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlam_jax import config as configs
from xlam_jax import errors
from xlam_jax.config import Resolved
from xlam_jax.errors import STOPPED, UserError
from xlam_jax.outputs import LOCK, PART, locked
from xlam_jax.parallel import distributed
from xlam_jax.parallel.link import Hosts, host_name
from xlam_jax.signals import Stop
from xlam_jax.training.facts import facts_of_run
from xlam_jax.training.trackers import check_trackers

if TYPE_CHECKING:
    from xlam_jax.data.corpus import Loaded
    from xlam_jax.data.identity import Identity
    from xlam_jax.training.progress import Progress
    from xlam_jax.training.setup import Setup
    from xlam_jax.training.step import State

CONFIG = "config.yaml"
SHOWN = 20
"""Trajectories that a message names at most."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlam_jax.train",
        description="Train a model as a config says; run again to continue.",
        epilog="fields of a config:\n" + configs.field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and where it comes from")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the data, compile and time the step, tell its costs; write nothing",
    )
    parser.add_argument(
        "--profile", type=_steps, metavar="START:STOP", help="trace these steps for XProf, into output_dir/profile"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set")
    distributed.add_arguments(parser)
    return parser


def main() -> int:
    arguments = parser().parse_intermixed_args()
    resolved = check(arguments)
    if arguments.print_config:
        print(configs.describe(resolved))
        return 0
    run = Path(resolved.config.output_dir)
    place = distributed.find(arguments, os.environ)
    with_huge_pages()
    with Stop() as stop, distributed.join(place, arguments.join_timeout, facts_of_run(resolved)) as hosts:
        from xlam_jax.training.progress import Progress

        if arguments.dry_run:
            from xlam_jax.training.dry_run import dry_run

            return dry_run(resolved, quiet=not hosts.first)
        with Progress(quiet=not hosts.first) as progress, writing(run, resolved, hosts, progress):
            return train(resolved, run, progress, hosts, stop, arguments.profile)


def check(arguments: argparse.Namespace) -> Resolved:
    """Loads the config and checks what costs no time. Raises `UserError`."""
    resolved = configs.load(arguments.config, arguments.overrides)
    if not arguments.print_config:
        check_trackers(resolved.config.track)
        check_run_folder(Path(resolved.config.output_dir), resolved)
    return resolved


def _steps(text: str) -> range:
    """START:STOP, both traced."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 ≤ START ≤ STOP, such as 10:12")
    return range(int(first), int(last) + 1)


def check_run_folder(run: Path, resolved: Resolved) -> None:
    """Raises `UserError` when the folder holds another run, or something that is no run at all."""
    from xlam_jax.models.config import read_hf_config

    saved = run / CONFIG
    if not saved.exists():
        if run.exists() and (not run.is_dir() or any(not _is_leftover(entry) for entry in run.iterdir())):
            raise UserError(f"output_dir: {run} exists and is not a run of this program; choose another folder")
        return
    try:
        old = configs.read_saved(saved)
    except UserError as error:
        raise UserError(f"{error}, or choose another output_dir") from None
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


def _is_leftover(entry: Path) -> bool:
    """Whether a run that was killed before it wrote its config leaves such a file."""
    return entry.suffix == PART or entry.name == LOCK


@contextlib.contextmanager
def writing(run: Path, resolved: Resolved, hosts: Hosts, progress: "Progress") -> Iterator[None]:
    """Keeps other runs from the run folder, which is made where it is missing. Raises `UserError` where one has it."""
    if not hosts.first:  # host 0 has the lock for all, and ends all where it can't be had
        yield
        return
    with locked(run, "output_dir", progress.line):
        check_run_folder(run, resolved)  # another run may have come to its end there since the first look
        yield


def with_huge_pages() -> None:
    """Starts this program again with transparent huge pages for malloc, which the C library reads only at start.

    XLA on a CPU takes fresh memory each step; faulting it in by small pages costs up to a third of the step.
    """
    tunable = "glibc.malloc.hugetlb=1"
    present = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in present:
        os.environ["GLIBC_TUNABLES"] = f"{present}:{tunable}" if present else tunable
        os.execv(sys.executable, sys.orig_argv)


def facts_of_data(identity: "Identity") -> dict[str, Any]:
    """What all hosts must have alike: the tokenizer and the examples of each source."""
    from xlam_jax.data.identity import describe_source, describe_tokenizer

    sources = {
        name: {part: of_source[part] for part in of_source if part != "dataset"}
        for name, of_source in identity["data"].items()
    }
    return {"the tokenizer": describe_tokenizer(identity["tokenizer"])} | {
        f"the data of {name}": describe_source(of_source) for name, of_source in sources.items()
    }


def newest_step(run: Path, hosts: Hosts, progress: "Progress") -> int:
    """The newest step that all hosts see whole; 0 for none.

    Raises `UserError` when some see steps and no step is seen by all.
    """
    from xlam_jax.training.checkpoint import STEPS, whole_steps

    seen = [set(steps) for steps in hosts.gather(whole_steps(run))]
    common = max(set.intersection(*seen), default=0)
    if len(set(map(frozenset, seen))) > 1:
        told = "; ".join(
            f"{host_name(process, hosts.names[process])} sees {', '.join(map(str, sorted(steps))) or 'none'}"
            for process, steps in enumerate(seen)
        )
        where = f"{run / STEPS}: the hosts see different checkpoints ({told})"
        if not common:
            raise UserError(f"{where}; output_dir must be on a file system that all of them share")
        progress.line(f"{where}; continuing from {common}, which all of them see")
    return common


def _items(state: "State") -> dict[str, Any]:
    """What a checkpoint keeps of the state; the step is its name."""
    items = {"params": state.params, "opt": state.opt}
    return items if state.ema is None else items | {"ema": state.ema}


def _not_finite(
    run: Path, step: int, told: dict[str, Any], loaded: "list[Loaded]", origins: list[tuple[int, int]], saved: list[int]
) -> str:
    """What to tell when a step's loss or gradient is no number."""
    from xlam_jax.training.checkpoint import STEPS

    ids = [f"{loaded[source].source.name}: {loaded[source].ids[row]}" for source, row in origins]
    shown = "\n  ".join(ids[:SHOWN]) + (f"\n  and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    folder = run / STEPS
    *before, newest = saved or [0]
    if newest == step - 1 > 0:  # whether its weights or the batch are to blame is open
        kept = f"checkpoint {folder / str(newest)} is what this step started from"
        kept += f", {folder / str(before[-1])} the last good one before it" if before else ", the only one"
    else:
        kept = f"the last good checkpoint is {folder / str(newest)}" if newest else "there is no checkpoint yet"
    return (
        f"step {step}: the loss is {told['loss']} and the gradient's norm {told['grad_norm']}; the run stops, nothing "
        f"of this step is saved, {kept}. Run again it would come to the same step: lower train.learning_rate, or leave "
        "out what is wrong in the data (data.sources.N.filters.exclude), in another output_dir. The batch held\n  "
        f"{shown}"
    )


def _with_reference(
    resolved: Resolved,
    run: Path,
    made: "Setup",
    initial: Any,
    frozen: Any,
    fingerprints: tuple[str | None, str],
    hosts: Hosts,
    progress: "Progress",
) -> "tuple[list[Loaded], str]":
    """The data with the scores of the reference policy, and the fingerprint of its weights: those that the run starts
    from. `initial`: these weights; None to read them again. `fingerprints`: theirs, where it is known, and that of
    `frozen`.
    """
    from xlam_jax.training import reference, weights

    config, (saved, of_frozen) = resolved.config, fingerprints

    def policy() -> Any:
        if initial is not None:
            return initial
        base = weights.read_base(resolved) if resolved.model.lora else None
        return weights.fresh(resolved, weights.read_initial(resolved, base), made.state.params)

    fingerprint = saved or weights.fingerprint(policy())

    def score() -> "reference.Scores":
        params = policy()
        weights.check_policy(resolved, fingerprint, weights.fingerprint(params))
        return reference.compute(resolved, made, params, frozen, progress)

    loaded, found = reference.attach(
        Path(config.objective.reference_cache or run / "reference"),
        made.loaded,
        reference.identity(
            made.loaded,
            weights=f"{fingerprint} {of_frozen}".strip(),
            model=resolved.hf_config,
            dtype=config.model.compute_dtype,
        ),
        score,
        progress.line,
        writes=hosts.first,
    )
    progress.line("reference policy: " + ("read" if found else "computed, and kept"))
    return loaded, fingerprint


def train(
    resolved: Resolved, run: Path, progress: "Progress", hosts: Hosts, stop: Stop, profiled: range | None = None
) -> int:
    """The whole run, in the order in which things happen. Returns the exit code: `STOPPED` when `stop` ended it."""
    config = resolved.config

    from xlam_jax.data import pipeline
    from xlam_jax.data.identity import identify
    from xlam_jax.data.tokenizer import save
    from xlam_jax.models.generation_config import GENERATION_CONFIG, copy_generation_config, read_generation_config
    from xlam_jax.outputs import remove_parts, replace_folder, write_text
    from xlam_jax.parallel.mesh import cpu_threads, keep_cpu_threads
    from xlam_jax.training.metrics import Metrics, plot
    from xlam_jax.training.progress import duration
    from xlam_jax.training.resume import check_data, check_threads, read_run
    from xlam_jax.training.setup import RUN, about, compiled_step, set_up
    from xlam_jax.training.trackers import flat, open_trackers

    for line in resolved.warnings:
        progress.line(f"warning: {line}")
    before = read_run(run / RUN, progress.line)
    if threads := before.get("cpu_threads"):
        keep_cpu_threads(threads[hosts.process if len(threads) == hosts.count else 0], config.mesh.cpu_devices)
    from xlam_jax.training import checkpoint, weights

    # ---- the start: opened before the data are rendered, which may take long, and before any file is written ---------
    start = newest_step(run, hosts, progress)
    checkpoint.check_names(run, range(start + 1, config.train.steps + 1))
    base = weights.read_base(resolved) if resolved.model.lora else None
    source = None if start else weights.source_folder(resolved)
    if source is not None:
        read_generation_config(source / GENERATION_CONFIG)
    initial = None if start else weights.read_initial(resolved, base)

    made = set_up(resolved, progress)
    identity = identify(made.loaded, made.tokenizer, config.data.tokenizer)
    distributed.agree(hosts, facts_of_data(identity))

    import jax
    import numpy as np

    from xlam_jax.parallel.hosts import merged
    from xlam_jax.training import evaluation
    from xlam_jax.training import step as steps
    from xlam_jax.training.optimizer import schedule

    frozen = weights.frozen(resolved, base, made.frozen, made.dtype)
    beside = weights.fingerprint(frozen) if frozen else None

    # ---- the run folder -------------------------------------------------------------------------------------------
    # The config first: it says whose folder this is, should the run be killed before the rest is written.
    if hosts.first:
        run.mkdir(parents=True, exist_ok=True)
        remove_parts(run)
        write_text(run / CONFIG, configs.to_yaml(config))
        checkpoint.write_hf_config(run, resolved.hf_config)
        if source is not None:
            copy_generation_config(source, run)
    distributed.check_shared(hosts, run / CONFIG)

    # ---- state: 1. this run's newest checkpoint; 2. model.init_from; 3. random -------------------------------------
    metadata = {"config": config.model_dump(mode="json"), "model": resolved.hf_config, "base": beside, **identity}
    metadata["cpu_threads"] = hosts.gather(cpu_threads()) if jax.default_backend() == "cpu" else None
    changes = before.get("data_changes", [])
    data_state = None
    if start:
        restored = checkpoint.restore_newest(
            run,
            start,
            _items(made.state),
            on_damage=config.checkpoint.on_damage,
            hosts=hosts,
            report=progress.line,
        )
        start, items, data_state, saved = restored
        weights.check_base(run, saved.get("base"), beside or "", config.model.init_from)
        state = steps.State(step=steps.put(np.int32(start), made.state.step.sharding), **items)
        metadata["reference"] = saved.get("reference")
        change, data_state = check_data(run, start, saved, identity, config.data, data_state, progress.line)
        changes += [change] if change else []
        check_threads(start, saved.get("cpu_threads"), metadata["cpu_threads"], progress.line)
        progress.line(f"continuing {run} after step {start}")
    else:
        state = steps.init_state(made.state, made.tx, weights.fresh(resolved, initial, made.state.params))
        progress.line(f"weights from {config.model.init_from or 'the seed'}")
    del base, initial
    finished = start >= config.train.steps
    # saved, and ended before its evaluation
    owed = bool(start) and (finished or start % config.eval.every == 0)
    owed = hosts.gather(owed and not checkpoint.is_evaluated(run / checkpoint.STEPS / str(start)))[0]
    # a finished run keeps the tokenizer that its checkpoints were saved with, and that exports look for
    if hosts.first and not (finished and (run / checkpoint.TOKENIZER).is_dir()):
        replaced = replace_folder(
            run / checkpoint.TOKENIZER, lambda part: save(made.tokenizer, part, config.data.format)
        )
        if replaced:
            progress.line(f"{run / checkpoint.TOKENIZER}: written again, as it was not {config.data.tokenizer}")
    if finished and not owed:
        progress.line(f"{run} is finished: {start} of {config.train.steps} steps")
        return 0
    saves = checkpoint.Checkpoints(run, keep=config.checkpoint.keep, metadata=metadata, best=config.checkpoint.best)
    if hosts.first:
        started = about(resolved, made, before) | {"cpu_threads": metadata["cpu_threads"], "data_changes": changes}
        write_text(run / RUN, json.dumps(started, indent=1) + "\n")
    loaded = made.loaded
    if configs.reference(config) == "precomputed":
        loaded, metadata["reference"] = _with_reference(
            resolved,
            run,
            made,
            # a resumed run reads the weights again that it began with
            None if start else state.params,
            frozen,
            (metadata.get("reference"), beside or ""),
            hosts,
            progress,
        )
    loader = pipeline.Loader(
        loaded,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        tokenizer=made.tokenizer,
        rows=made.rows(config.train.batch_size),
    )
    if data_state is not None:
        loader.restore(data_state)

    # ---- compile --------------------------------------------------------------------------------------------------
    batch, origins = made.batch(next(loader), config.train.batch_size), loader.origins()
    began = time.monotonic()
    compiled = compiled_step(resolved, made, state, frozen, batch, progress)
    eval_step = jax.jit(
        steps.make_eval_step(
            resolved.model,
            made.mesh,
            compute_dtype=made.dtype,
            objective=made.objective,
            quantized=made.quantized,
            kernels=made.kernels,
        )
    )
    rate = schedule(config.train)
    metrics = Metrics(
        run,
        start=start,
        evaluated=not owed,
        steps=config.train.steps,
        places=config.train.batch_size * config.data.sequence_length,
        progress=progress,
        log_every=config.train.log_every,
        trackers=open_trackers(config.track, run, config.model_dump(mode="json"), progress.line, after=start)
        if hosts.first
        else None,
        writes=hosts.first,
    )
    names, kinds = [source.name for source in config.data.sources], config.objective.kind == "sft"
    asked = evaluation.Requests(resolved, made) if config.eval.requests else None

    def evaluate(step: int) -> dict[str, float]:
        """Records the evaluation after a step and returns it flat."""
        params = state.params if state.ema is None else state.ema
        rows = config.train.batch_size // config.train.microbatches
        batches = pipeline.heldout_batches(
            loaded, config.data, rows=rows, limit=config.eval.batches, mine=made.rows(rows)
        )
        sums = (eval_step(params, frozen, made.batch(mine, rows)) for mine in batches)
        told: dict[str, Any] = {}
        if values := evaluation.heldout(sums, names, kinds=kinds):
            metrics.record(step, "heldout", values)
            told["heldout"] = values
        every = config.eval.requests_every
        if asked and (every is None or step % every == 0 or step == config.train.steps):
            answers = asked.answer(params, frozen)
            metrics.append_samples(answer.record(step) for answer in answers)
            told["requests"] = asked.summary(answers)
            metrics.record(step, "requests", told["requests"])
        return flat(told, ".")

    def log(step: int, values: dict[str, Any], origins: "list[tuple[int, int]]") -> None:
        told = evaluation.record(values, names, kinds=False)
        if not (math.isfinite(told["loss"]) and math.isfinite(told["grad_norm"])):
            saves.wait()
            hosts.gather(None)  # the first to end ends all
            raise UserError(_not_finite(run, step, told, loaded, origins, saves.steps()))
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        told |= {"learning_rate": float(np.asarray(rate(step - 1)))} | ({"memory": memory} if memory else {})
        metrics.record(step, "train", told)

    def save_step(step: int) -> None:
        with metrics.paused("saving"):
            saves.save(step, _items(state), merged(loader.state()))

    # ---- the loop -------------------------------------------------------------------------------------------------
    best = hosts.gather(saves.best())[0]
    step = start
    stop.save_first(progress.line)
    with saves, metrics:
        if owed or not start:
            with metrics.paused("evaluating"):
                told = evaluate(start)
            if owed:
                saves.record(start, told)
        last: tuple[int, dict[str, Any], Any] | None = None
        for step in range(start + 1, config.train.steps + 1):
            if profiled and step == max(profiled.start, start + 1):
                jax.profiler.start_trace(str(run / "profile"))
            state, values = compiled(state, frozen, batch)
            if last:  # the step before, while this one runs
                log(*last)
            last = (step, values, origins)
            finished = step == config.train.steps
            ends = hosts.stops(step, stop.requested) or finished
            if profiled and step in profiled and (ends or step == profiled[-1]):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                progress.line(f"traced up to step {step}: {run / 'profile'}")
            # Saved first: an evaluation may take long, and the run may be killed in it. A stopped run leaves it to the
            # run that continues.
            save_now = ends or step % config.checkpoint.every == 0
            eval_now = finished or (not ends and step % config.eval.every == 0)
            if save_now or eval_now:
                log(*last)
                last = None
            if save_now:
                save_step(step)
            if eval_now:
                with metrics.paused("evaluating"):
                    told = evaluate(step)
                name = config.checkpoint.best or ""
                value = told.get(name, math.nan)
                if math.isfinite(value) and (best is None or checkpoint.better(name, value, best[1])):
                    best = (step, value)
                    if not save_now:
                        save_now = True
                        save_step(step)
                if save_now:
                    saves.record(step, told)
            if ends:
                break
            batch, origins = made.batch(next(loader), config.train.batch_size), loader.origins()
        saves.wait()
        best = saves.best()
    if hosts.first:
        progress.line(f"loss plot: {plot(run)}")
    if best:
        progress.line(f"best {config.checkpoint.best}: {best[1]:.4f}, {run / checkpoint.STEPS / str(best[0])}")
    if step < config.train.steps:
        progress.line(f"stopped by {stop.name} after step {step}, saved; run the same command to continue")
        return STOPPED
    progress.line(
        f"finished {step} steps in {duration(time.monotonic() - began)}; checkpoint: {checkpoint.resolve(run)}"
    )
    return 0


if __name__ == "__main__":
    errors.run(main)
