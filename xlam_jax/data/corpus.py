"""The data of a run: its sources, read and rendered now, or opened from a prepared cache."""

from pathlib import Path
from typing import Any

from xlam_jax.config import Data
from xlam_jax.data import cache
from xlam_jax.data.examples import Loaded
from xlam_jax.data.render_sources import Progress, ignore_progress, render_sources
from xlam_jax.errors import UserError
from xlam_jax.outputs import new_folder


def load(data: Data, tokenizer: Any, progress: Progress = ignore_progress, annotate: bool = False) -> list[Loaded]:
    """Returns every source of a config, from `data.cache` where it is set.

    With `annotate` the examples have the turn of each token, and the trajectories are kept; then the sources are read
    even where there is a cache, which is checked. Raises `UserError` as `render_sources` and `cache.open` do.
    """
    if data.cache is not None:
        if not annotate:
            return cache.open(data.cache, data, tokenizer, progress)
        cache.verify(data.cache, data, tokenizer, progress)  # what is shown is what training reads
    return render_sources(data, tokenizer, progress, annotate)


def prepare(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = ignore_progress) -> None:
    """Renders the sources of a config into a new cache, which appears when it is complete.

    Raises `UserError` as `render_sources` does, when the folder exists, and when augmentation is on.
    """
    if data.augment.active:
        raise UserError(
            "data.augment draws another variant in each epoch, and a cache holds one; turn it off to use a cache"
        )
    data = data.model_copy(update={"cache": None})
    with new_folder(Path(folder)) as part:
        key = cache.make_key(data, tokenizer)  # before the sources are read: a source that changes meanwhile is stale
        cache.write(part, key, render_sources(data, tokenizer, progress))
