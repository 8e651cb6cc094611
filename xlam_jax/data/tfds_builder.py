"""TFDS datasets of trajectories: `unified_trajectories`, a configuration for each set of files, as ArrayRecord.

    python -m xlam_jax.data.tfds_builder --name webshop --files webshop.jsonl --data-dir DIR

then `tfds: unified_trajectories/webshop` in a config, with TFDS_DATA_DIR=DIR. Everyone else reads it by
`tfds.data_source("unified_trajectories/webshop", split="train", data_dir=DIR)`. Rows are in the order of the files;
what JSON nests stays JSON text, and so does the score, which TFDS would round to 32 bits. TensorFlow is not imported.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xlam_jax import cli
from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict
from xlam_jax.errors import UserError
from xlam_jax.outputs import refuse_existing

NESTED = ("tools", "conversation")


@dataclasses.dataclass(eq=False)
class Trajectories(tfds.core.BuilderConfig):
    """What a configuration is made of; needed to build it, not to read it."""

    source: Source | None = None
    """The trajectories."""
    split: str = "train"
    """What they are called."""
    drop_invalid: bool = False
    """Rows that are no trajectory are left out and counted in the builder's `dropped`, instead of ending the build."""


class UnifiedTrajectories(tfds.core.GeneratorBasedBuilder, skip_registration=__name__ == "__main__"):
    """Conversations of an agent with the tools it may call, one format for all sources."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing lies beside the code; finding it out would need a package that TFDS does not declare

    def __init__(self, *, config: Trajectories | str | None = None, **options: Any):
        self.dropped: Counter[str] = Counter()
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
            disable_shuffling=True,  # as the files are: `limit` then means the same
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        if not isinstance(config, Trajectories) or config.source is None:
            raise ValueError("to build a configuration give `config=Trajectories(name=…, source=…)`")
        return {config.split: self._generate_examples(config.source, config.drop_invalid)}

    def _generate_examples(self, source: Source, drop_invalid: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for item in sources.read(source):
            match item.trajectory:
                case Trajectory() as trajectory:
                    yield number, _features(trajectory)
                    number += 1
                case InvalidTrajectory(reason=reason, detail=detail):
                    if not drop_invalid:
                        raise UserError(
                            f"{item.where}: {reason}: {detail}; correct the line, or leave such lines out with "
                            "--drop-invalid"
                        )
                    self.dropped[reason] += 1
                case sources.Filtered(reason):
                    self.dropped[reason] += 1


def _features(trajectory: Trajectory) -> dict[str, Any]:
    row = {"source": None, "score": None, "task_instruction": ""} | to_dict(trajectory)
    texts = {key: json.dumps(row[key], ensure_ascii=False) for key in NESTED}
    return row | texts | {"score": None if row["score"] is None else repr(row["score"])}


def plain(value: Any) -> Any:
    """A row of `tfds.data_source` as JSON values: text for bytes, lists for arrays.

    Raises `InvalidTrajectory` for bytes that are no text.
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


def build(config: Trajectories, data_dir: Path) -> UnifiedTrajectories:
    """Builds `unified_trajectories/NAME` in `data_dir` and returns its builder.

    Raises `UserError` when it is there already, and for a row that is no trajectory unless such are dropped.
    """
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(f"--name is {config.name!r}; letters, digits, '_', '.' and '-' are possible")
    builder = UnifiedTrajectories(config=config, data_dir=str(data_dir), file_format="array_record")
    refuse_existing(Path(builder.data_path), "--name")
    with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(None):  # it tells of downloads
        builder.download_and_prepare(download_dir=nothing)
    return builder


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m xlam_jax.data.tfds_builder",
        description="Builds a TFDS dataset of trajectories, as ArrayRecord.",
    )
    parser.add_argument("--name", required=True, help="of the configuration: unified_trajectories/NAME")
    parser.add_argument("--files", required=True, nargs="+", metavar="FILE", help="as `files` of a source in a config")
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="where TFDS keeps its datasets")
    parser.add_argument("--split", default="train", help="what the files are (default: train)")
    parser.add_argument("--format", default="unified", help="of the files' rows (default: unified)")
    parser.add_argument("--drop-invalid", action="store_true", help="leave out rows that are no trajectory")
    options = parser.parse_args(arguments)
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    source = Source(name=options.name, files=options.files, format=options.format)
    config = Trajectories(name=options.name, source=source, split=options.split, drop_invalid=options.drop_invalid)
    builder = build(config, options.data_dir)
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(builder.dropped.items()))
    count = builder.info.splits[options.split].num_examples
    print(f"{builder.data_path}: {count} trajectories, dropped: {dropped or 'none'}")
    print(f"in a config: tfds: {builder.name}/{options.name}:{builder.version}, with TFDS_DATA_DIR={options.data_dir}")


if __name__ == "__main__":
    from xlam_jax.data.tfds_builder import main as registered_main  # the class above has no place in the registry

    cli.run(registered_main)
