"""The TFDS dataset `unified_trajectories`, with one configuration per set of files, as ArrayRecord.

Importing this module registers it with TFDS. `xlam_jax.data.tfds_builder` builds configurations, and
`xlam_jax.data.sources` reads them. Rows are in the order of the files. Nested values are JSON texts, and so is the
score, which TFDS would round to 32 bits. TensorFlow is not imported.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict

NESTED = ("tools", "conversation")


@dataclasses.dataclass(eq=False)
class Trajectories(tfds.core.BuilderConfig):
    """A configuration; building it needs the fields, reading it does not."""

    trajectories: Callable[[], Iterable[Trajectory]] | None = None
    """Reads the trajectories."""
    split: str = "train"
    """The name of the split that contains them."""


class UnifiedTrajectories(tfds.core.GeneratorBasedBuilder):
    """Conversations of an agent with the tools it may call, one format for all sources."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # skips TFDS's search for files next to the code, which needs an undeclared package

    def __init__(self, *, config: Trajectories | str | None = None, **options: Any):
        super().__init__(config=config, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        text, optional = tfds.features.Text(), tfds.features.Scalar(np.str_, optional=True)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "unique_trajectory_id": text,
                    "source": optional,
                    "score": optional,
                    "task_instruction": text,
                    "tools": text,
                    "conversation": text,
                }
            ),
            disable_shuffling=True,  # keeps the order of the files, so that `limit` selects the same rows
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        if not isinstance(config, Trajectories) or config.trajectories is None:
            raise ValueError("to build a configuration give `config=Trajectories(name=…, trajectories=…)`")
        return {config.split: self._generate_examples(config.trajectories)}

    def _generate_examples(
        self, trajectories: Callable[[], Iterable[Trajectory]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, trajectory in enumerate(trajectories()):
            yield number, _features(trajectory)


def _features(trajectory: Trajectory) -> dict[str, Any]:
    row = {"source": None, "score": None, "task_instruction": ""} | to_dict(trajectory)
    texts = {key: json.dumps(row[key], ensure_ascii=False) for key in NESTED}
    return row | texts | {"score": None if row["score"] is None else repr(row["score"])}


def plain(value: Any) -> Any:
    """Converts a row of `tfds.data_source` to JSON values: bytes to text, arrays to lists.

    Raises `InvalidTrajectory` for bytes that are not UTF-8.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidTrajectory("bad-value", f"{value[:20]!r}… is bytes, not text") from None
    return value
