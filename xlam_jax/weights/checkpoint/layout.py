"""Files of a run folder (or of a converted model) that hold weights, and which of them are complete checkpoints."""

import re
from pathlib import Path

from xlam_jax.digest import hex_digest
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError

TOKENIZER = "tokenizer"
HF_CONFIG = "config.json"
METADATA = "_CHECKPOINT_METADATA"
EVALUATION = "evaluation.json"


class DamagedError(UserError):
    """A step folder has missing files, files that can't be decoded, or other values than were saved."""

    def __init__(self, step_dir: Path, reason: str):
        self.problem = f"{step_dir} is damaged: {reason}"
        older = [str(step) for step in reversed(whole_steps(step_dir.parent.parent)) if str(step) != step_dir.name]
        advice = (
            f"give another step of this run ({', '.join(older)}), which is verified in turn"
            if older
            else "there is no other step here: train or convert again, or restore the folder from a copy"
        )
        super().__init__(f"{self.problem}; {advice}")


def whole_steps(run: Path) -> list[int]:
    """The complete steps of a run folder, in order. Other entries of its checkpoints/ are ignored."""
    folder = run / STEPS_FOLDER
    return sorted(int(entry.name) for entry in folder.iterdir() if is_step(entry)) if folder.is_dir() else []


def is_step(entry: Path) -> bool:
    """Whether an entry of checkpoints/ is a step: its name is a number, and it contains metadata or parameters."""
    return _is_number(entry.name) and any((entry / name).exists() for name in (METADATA, "params", "ema"))


def is_checkpoint(path: Path) -> bool:
    """Whether `resolve` would return a step for this path."""
    return (_is_number(path.name) and path.parent.name == STEPS_FOLDER) or bool(whole_steps(path))


def resolve(path: Path) -> Path:
    """Returns the step folder that `path` names: itself, or the newest complete one of a run folder.

    Raises `UserError` when there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; a run folder or one of its {STEPS_FOLDER}/STEP folders is expected")
    if _is_number(path.name) and path.parent.name == STEPS_FOLDER:
        return path
    steps = whole_steps(path)
    if not steps:
        raise UserError(
            f"{path}: holds no {STEPS_FOLDER}/STEP folder; give a run folder, a step folder of one, or train first"
        )
    return path / STEPS_FOLDER / str(steps[-1])


def check_names(run: Path, steps: range) -> None:
    """Raises `UserError` when an entry that is not a step has the name of a step that the run is going to save."""
    for entry in (run / STEPS_FOLDER).iterdir() if (run / STEPS_FOLDER).is_dir() else ():
        if _is_number(entry.name) and int(entry.name) in steps and not is_step(entry):
            raise UserError(
                f"{entry}: not a checkpoint, but it has the name of one that this run is going to save; move it away"
            )


def stamp(step_dir: Path) -> str:
    """Identifies a step among those of all runs; a copy has the same stamp. Orbax stores the time in nanoseconds."""
    metadata = step_dir / METADATA
    content = metadata.read_bytes() if metadata.is_file() else str(step_dir.stat().st_mtime_ns).encode()
    return f"step {step_dir.name}, {hex_digest(content, length=16)}"


def _is_number(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", name) is not None
