"""`--profile START:STOP`: traces some steps of a run for XProf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps of a range into a folder; does nothing without a range."""

    def __init__(self, steps: range | None, *, first: int, folder: Path, report: Callable[[str], None]):
        """`first`: the first step that this process takes; a trace can't begin earlier."""
        self._steps = steps or range(0)
        self._begin = max(self._steps.start, first)
        self._folder, self._report = folder, report

    def before(self, step: int) -> None:
        """Starts the trace before its first step."""
        if self._steps and step == self._begin:
            jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, state: Any, *, is_last: bool) -> None:
        """Ends the trace after its last step or the last step of the run. `state`: the output of the step."""
        if step in self._steps and (is_last or step == self._steps[-1]):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._report(f"traced up to step {step}: {self._folder}")
