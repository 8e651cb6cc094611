"""Where a run starts: after which step, and from which weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xlam_jax.config import Resolved
from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config
from xlam_jax.models.params import Params
from xlam_jax.parallel.link import Hosts
from xlam_jax.training.run_folder import newest_step
from xlam_jax.weights import run as weights
from xlam_jax.weights.checkpoint import check_names


@dataclass(frozen=True)
class Start:
    """Start of a run. The weights are opened here and read later, shard by shard."""

    step: int
    """The newest complete step of this run; 0 for a new run."""
    base: Params | None
    """The weights of `model.init_from` that adapters are trained on; None for full training, and for random weights."""
    initial: Params | None
    """The initial trainable weights of a new run: those of `model.init_from`, or the adapters of `lora.init_from`. None
    for random ones, and for a resumed run."""
    source: Path | None
    """The folder of the weights of a new run, with other files such as its generation config."""


def open_start(resolved: Resolved, run: Path, hosts: Hosts, report: Callable[[str], None]) -> Start:
    """Finds the checkpoint to continue from, and opens the weights that the run reads.

    Called before the data are rendered, which may take long, and before any file is written. Raises `UserError` for
    weights that are missing or do not fit.
    """
    step = newest_step(run, hosts, report)
    check_names(run, range(step + 1, resolved.config.train.steps + 1))
    base = weights.read_base(resolved) if resolved.model.lora else None
    source = None if step else weights.source_folder(resolved)
    if source is not None:
        read_generation_config(source / GENERATION_CONFIG)
    initial = None if step else weights.read_initial(resolved, base)
    return Start(step, base, initial, source)
