"""trackio."""

import secrets

from xlam_jax.training.trackers.tracker import Flat, TrackedRun


class Trackio:
    """trackio: a store on this machine, or the Space in TRACKIO_SPACE_ID."""

    def start(self, run: TrackedRun) -> str:
        import trackio

        # trackio identifies a run by its name, and takes the newest of that name
        name = run.own_name or f"{run.name}-{secrets.token_hex(2)}"
        resume = "must" if run.own_name else "never"
        self._run = trackio.init(project=run.project, name=name, config=dict(run.config), resume=resume, embed=False)
        self._next = getattr(self._run, "_next_step", 0) if run.own_name else 0  # there is no public way to ask
        return name

    def log(self, step: int, values: Flat) -> None:
        if step >= self._next:  # it has the same values of earlier steps from before the run was killed
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()
