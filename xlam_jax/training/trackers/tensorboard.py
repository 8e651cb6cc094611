"""TensorBoard."""

from xlam_jax.training.trackers.tracker import Flat, TrackedRun


class TensorBoard:
    """Event files in the run folder."""

    def start(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        # hides what a killed run wrote from this step on; a run without a checkpoint starts before its step 0
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.after + 1 if run.after else 0)

    def log(self, step: int, values: Flat) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()  # otherwise a killed run would lose values from before its last checkpoint

    def close(self, failed: bool) -> None:
        self._board.close()
