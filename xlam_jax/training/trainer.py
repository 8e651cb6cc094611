"""A training run: restores its state, then steps, evaluates, logs and saves until the last step or a signal."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.data import pipeline
from xlam_jax.data.corpus import Loaded
from xlam_jax.data.identity import Identity
from xlam_jax.data.tokenizer import save
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import STOPPED, UserError
from xlam_jax.outputs import replace_folder
from xlam_jax.parallel.hosts import merged
from xlam_jax.parallel.link import Hosts
from xlam_jax.parallel.mesh import cpu_threads
from xlam_jax.parallel.placement import put
from xlam_jax.progress import Progress, duration
from xlam_jax.signals import Stop
from xlam_jax.training import reference
from xlam_jax.training.evaluation import Evaluator, Requests, to_record
from xlam_jax.training.metrics import Metrics, plot
from xlam_jax.training.optimizer import schedule
from xlam_jax.training.profiler import Profiler
from xlam_jax.training.restore import restore_newest
from xlam_jax.training.resume import check_data, check_threads
from xlam_jax.training.run_folder import write_run
from xlam_jax.training.save import Checkpoints, better, is_evaluated
from xlam_jax.training.setup import Setup, compile_step
from xlam_jax.training.start import Start
from xlam_jax.training.step import State, init_state
from xlam_jax.training.trackers import flatten, open_trackers
from xlam_jax.weights import run as weights
from xlam_jax.weights.checkpoint import TOKENIZER, resolve

SHOWN = 20
"""Maximum number of trajectories that a message names."""


class Trainer:
    """One run. Call `restore`, `prepare` and `run`, in this order; each depends on the one before."""

    state: State
    start: int
    """The step after which this process continues; 0 for a new run."""
    data_state: dict[str, Any] | None = None
    """The position in the data to continue from; None for a new run."""
    needs_evaluation: bool
    """Whether the checkpoint of `start` was saved, and the run ended before its evaluation was complete."""
    best: tuple[int, float] | None = None
    """The step with the best value of `checkpoint.best` so far, and the value."""
    pending: tuple[int, dict[str, Any], list[tuple[int, int]]] | None = None
    """The last step, its metrics and the origins of its batch, until they are logged."""

    def __init__(
        self,
        resolved: Resolved,
        run: Path,
        setup: Setup,
        frozen: Any,
        identity: Identity,
        earlier: dict[str, Any],
        hosts: Hosts,
        progress: Progress,
    ):
        """`frozen`: the weights that do not train, {} if none. `identity`: of the data and the tokenizer. `earlier`:
        run.json of an earlier start, {} if none."""
        self.resolved, self.config, self.run_dir = resolved, resolved.config, run
        self.setup, self.frozen, self.identity, self.earlier = setup, frozen, identity, earlier
        self.hosts, self.progress, self.report = hosts, progress, progress.line
        self.loaded: list[Loaded] = setup.loaded
        self.sources = [source.name for source in self.config.data.sources]
        self.steps = self.config.train.steps
        self.learning_rate = schedule(self.config.train)
        self.data_changes: list[Any] = earlier.get("data_changes", [])
        self.base_fingerprint = weights.fingerprint(frozen) if frozen else None
        self.metadata: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            "model": resolved.hf_config,
            "base": self.base_fingerprint,
            **identity,
            "cpu_threads": hosts.gather(cpu_threads()) if jax.default_backend() == "cpu" else None,
        }

    def restore(self, start: Start) -> None:
        """Sets the state, from the first that exists of: 1. this run's newest checkpoint; 2. `model.init_from`;
        3. random weights. Then writes the tokenizer that belongs to it. Raises `UserError`."""
        self.start = start.step
        if start.step:
            self._restore_checkpoint(start.step)
        else:
            initial = weights.fresh(self.resolved, start.initial, self.setup.state.params)
            self.state = init_state(self.setup.state, self.setup.tx, initial)
            self.report(f"weights from {self.config.model.init_from or 'the seed'}")
        finished = self.start >= self.steps
        was_due = bool(self.start) and self.config.eval.is_due(self.start, last=finished)
        step_dir = self.run_dir / STEPS_FOLDER / str(self.start)
        self.needs_evaluation = self.hosts.gather(was_due and not is_evaluated(step_dir))[0]
        # a finished run keeps the tokenizer that its checkpoints were saved with, and that exports read
        folder = self.run_dir / TOKENIZER
        if self.hosts.first and not (finished and folder.is_dir()):
            tokenizer, data = self.setup.tokenizer, self.config.data
            if replace_folder(folder, lambda part: save(tokenizer, part, data.format, before=folder)):
                self.report(f"{folder}: written again, as it was not {data.tokenizer}")

    def _restore_checkpoint(self, newest: int) -> None:
        config, setup = self.config, self.setup
        restored = restore_newest(
            self.run_dir,
            newest,
            setup.state.trees(),
            on_damage=config.checkpoint.on_damage,
            hosts=self.hosts,
            report=self.report,
        )
        step, saved = restored.step, restored.metadata
        weights.check_base(self.run_dir, saved.get("base"), self.base_fingerprint or "", config.model.init_from)
        self.state = State(step=put(np.int32(step), setup.state.step.sharding), **restored.items)
        self.metadata["reference"] = saved.get("reference")
        change, self.data_state = check_data(
            self.run_dir, step, saved, self.identity, config.data, restored.data, self.report
        )
        self.data_changes += [change] if change else []
        check_threads(step, saved.get("cpu_threads"), self.metadata["cpu_threads"], self.report)
        self.start = step
        self.report(f"continuing {self.run_dir} after step {step}")

    @property
    def is_complete(self) -> bool:
        """Whether the run has taken and evaluated its last step, so that there is nothing to do."""
        return self.start >= self.steps and not self.needs_evaluation

    def prepare(self) -> None:
        """Prepares the loop: checkpoints, data, the compiled step, evaluation and metrics."""
        config, setup = self.config, self.setup
        self.checkpoints = Checkpoints(
            self.run_dir, keep=config.checkpoint.keep, metadata=self.metadata, best=config.checkpoint.best
        )
        if self.hosts.first:
            threads = self.metadata["cpu_threads"]
            write_run(self.run_dir, config, setup, self.earlier, cpu_threads=threads, data_changes=self.data_changes)
        if configs.reference(config) == "precomputed":
            self._attach_reference()
        self.loader = pipeline.Loader(
            self.loaded,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.seed,
            tokenizer=setup.tokenizer,
            rows=setup.rows(config.train.batch_size),
        )
        if self.data_state is not None:
            self.loader.restore(self.data_state)
        self.next_batch()
        self.began = time.monotonic()
        self.compiled = compile_step(setup, self.state, self.frozen, self.batch, self.report)
        rows = config.train.batch_size // config.train.microbatches
        self.evaluator = Evaluator(setup, self.loaded, config.data, rows=rows, batches=config.eval.batches)
        self.metrics = self._open_metrics()
        self.requests = Requests(setup, config.data, config.eval, rows=rows) if config.eval.requests else None

    def _attach_reference(self) -> None:
        """Adds the scores of the reference policy to the data, and its fingerprint to the metadata of checkpoints."""
        self.loaded, self.metadata["reference"] = reference.load_or_compute(
            self.resolved,
            self.run_dir,
            self.setup,
            None if self.start else self.state.params,
            self.frozen,
            (self.metadata.get("reference"), self.base_fingerprint or ""),
            self.hosts,
            self.progress,
        )

    def _open_metrics(self) -> Metrics:
        config, trackers = self.config, None
        if self.hosts.first:
            values = config.model_dump(mode="json")
            trackers = open_trackers(config.track, self.run_dir, values, self.report, after=self.start)
        return Metrics(
            self.run_dir,
            start=self.start,
            evaluated=not self.needs_evaluation,
            steps=self.steps,
            places=config.train.batch_size * config.data.sequence_length,
            progress=self.progress,
            log_every=config.train.log_every,
            trackers=trackers,
            writes=self.hosts.first,
        )

    def run(self, stop: Stop, profiled: range | None = None) -> int:
        """Trains, to the last step or until `stop`. Returns the exit code: `STOPPED` when a signal ended the run."""
        profiler = Profiler(profiled, first=self.start + 1, folder=self.run_dir / "profile", report=self.report)
        self.best = self.hosts.gather(self.checkpoints.best())[0]
        stop.save_first(self.report)
        with self.checkpoints, self.metrics:
            if self.needs_evaluation or (not self.start and self.config.eval.is_due(0)):
                evaluation = self.evaluate(self.start)
                if self.needs_evaluation:
                    self.checkpoints.record(self.start, evaluation)
            step = self.loop(stop, profiler)
            self.checkpoints.wait()
            self.best = self.checkpoints.best()
        self._report_end(step)
        if step < self.steps:
            self.report(f"stopped by {stop.name} after step {step}, saved; run the same command to continue")
            return STOPPED
        took = duration(time.monotonic() - self.began)
        self.report(f"finished {step} steps in {took}; checkpoint: {resolve(self.run_dir)}")
        return 0

    def loop(self, stop: Stop, profiler: Profiler) -> int:
        """Takes steps until the last one or until `stop`; returns the last step taken.

        A step is saved before it is evaluated, because an evaluation may take long, and the run may be killed during
        it. If a run is stopped, the run that continues it does the evaluation.
        """
        config, step = self.config, self.start
        for step in range(self.start + 1, self.steps + 1):
            profiler.before(step)
            values = self.step()
            self.log()  # the step before, while the devices compute this one
            self.pending = step, values, self.origins
            is_last = step == self.steps
            ends = self.hosts.stops(step, stop.requested) or is_last
            profiler.after(step, self.state, is_last=ends)
            save_due = ends or step % config.checkpoint.every == 0
            evaluation_due = (is_last or not ends) and config.eval.is_due(step, last=is_last)
            if save_due or evaluation_due:
                self.log()
            if save_due:
                self.save(step)
            if evaluation_due:
                self._keep_best(step, self.evaluate(step), is_saved=save_due)
            if ends:
                break
            self.next_batch()
        return step

    def next_batch(self) -> None:
        """Puts the next batch onto the devices."""
        self.batch = self.setup.batch(next(self.loader), self.config.train.batch_size)
        self.origins = self.loader.origins()

    def step(self) -> dict[str, Any]:
        """Starts one step on the current batch; returns its metrics, which the devices are still computing."""
        self.state, values = self.compiled(self.state, self.frozen, self.batch)
        return values

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates after a step, records the results and returns them by path, such as heldout.loss."""
        section, results = self.config.eval, {}
        params = self.state.params if self.state.ema is None else self.state.ema
        with self.metrics.paused("evaluating"):
            if values := self.evaluator.heldout(params, self.frozen):
                self.metrics.record(step, "heldout", values)
                results["heldout"] = values
            every = section.requests_every
            if self.requests and (every is None or step % every == 0 or step == self.steps):
                answers = self.requests.answer(params, self.frozen)
                self.metrics.append_samples(answer.record(step) for answer in answers)
                results["requests"] = self.requests.summary(answers)
                self.metrics.record(step, "requests", results["requests"])
        return flatten(results, ".")

    def log(self) -> None:
        """Records the metrics of the pending step, if any. Raises `UserError` when its loss or gradient is not
        finite."""
        if self.pending is None:
            return
        (step, values, origins), self.pending = self.pending, None
        record = to_record(values, self.sources, kinds=False)
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            self.checkpoints.wait()
            self.hosts.gather(None)  # the first host to end ends all of them
            raise UserError(self._divergence(step, record, origins))
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        record["learning_rate"] = float(np.asarray(self.learning_rate(step - 1)))
        self.metrics.record(step, "train", record | ({"memory": memory} if memory else {}))

    def save(self, step: int) -> None:
        """Starts saving the state after a step, with the position in the data. All hosts call it together.

        Raises `UserError` when an earlier save failed.
        """
        with self.metrics.paused("saving"):
            self.checkpoints.save(step, self.state.trees(), merged(self.loader.state()))

    def _keep_best(self, step: int, evaluation: dict[str, float], *, is_saved: bool) -> None:
        """Saves a step whose evaluation is the best so far, and stores the evaluation with the checkpoint."""
        name = self.config.checkpoint.best or ""
        value = evaluation.get(name, math.nan)
        if math.isfinite(value) and (self.best is None or better(name, value, self.best[1])):
            self.best = (step, value)
            if not is_saved:
                self.save(step)
                is_saved = True
        if is_saved:
            self.checkpoints.record(step, evaluation)

    def _report_end(self, step: int) -> None:
        if self.hosts.first:
            self.report(f"loss plot: {plot(self.run_dir)}")
        if self.best:
            best, value = self.best
            self.report(f"best {self.config.checkpoint.best}: {value:.4f}, {self.run_dir / STEPS_FOLDER / str(best)}")

    def _divergence(self, step: int, record: dict[str, Any], origins: list[tuple[int, int]]) -> str:
        """Returns the message for a step whose loss or gradient is not finite."""
        ids = [f"{self.loaded[source].source.name}: {self.loaded[source].ids[row]}" for source, row in origins]
        shown = "\n  ".join(ids[:SHOWN]) + (f"\n  and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
        folder = self.run_dir / STEPS_FOLDER
        *before, newest = self.checkpoints.steps() or [0]
        if newest == step - 1 > 0:  # its weights or the batch may be to blame
            kept = f"checkpoint {folder / str(newest)} is what this step started from"
            kept += f", {folder / str(before[-1])} the last good one before it" if before else ", the only one"
        else:
            kept = f"the last good checkpoint is {folder / str(newest)}" if newest else "there is no checkpoint yet"
        return (
            f"step {step}: the loss is {record['loss']} and the gradient's norm {record['grad_norm']}; the run stops, "
            f"nothing of this step is saved, {kept}. The same command would reach the same step: lower "
            "train.learning_rate, or exclude wrong trajectories (data.sources.N.filters.exclude), in another "
            f"output_dir. The batch contained\n  {shown}"
        )
