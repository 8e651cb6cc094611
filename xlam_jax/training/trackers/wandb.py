"""Weights & Biases."""

import os
import secrets

from xlam_jax.training.trackers.tracker import Flat, TrackedRun


class Wandb:
    """Weights & Biases; its files are written to the run folder unless WANDB_DIR names another."""

    def start(self, run: TrackedRun) -> str:
        import wandb

        # without a key it would ask at the terminal
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise PermissionError("no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        name = run.own_name or secrets.token_hex(4)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=name,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", run.folder),
            config=run.config,
            # it would record the redraws of the panel as a log
            settings=None if "WANDB_CONSOLE" in os.environ else wandb.Settings(console="off"),
        )
        self._next = self._run.starting_step
        return name

    def log(self, step: int, values: Flat) -> None:
        if step >= self._next:  # it has the same values of earlier steps from before the run was killed
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
