"""Builds TFDS datasets of trajectories: `unified_trajectories`, with one configuration per set of files.

    python -m xlam_jax.data.tfds_builder --name webshop --files webshop.jsonl --data-dir DIR

then `tfds: unified_trajectories/webshop` in a config, with TFDS_DATA_DIR=DIR. Other programs read it with
`tfds.data_source("unified_trajectories/webshop", split="train", data_dir=DIR)`.
"""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from xlam_jax import cli
from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.examples import counts_text
from xlam_jax.data.tfds_dataset import Trajectories, UnifiedTrajectories
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.errors import UserError
from xlam_jax.outputs import refuse_existing


def build(
    source: Source, data_dir: Path, *, split: str = "train", drop_invalid: bool = False
) -> tuple[UnifiedTrajectories, Counter[str]]:
    """Builds `unified_trajectories/<name of the source>` in `data_dir`.

    Returns its builder, and the number of dropped rows by reason. Raises `UserError` when the dataset exists, and for
    an invalid row unless `drop_invalid`.
    """
    if not re.fullmatch(r"\w[\w.-]*", source.name):
        raise UserError(f"--name is {source.name!r}; letters, digits, '_', '.' and '-' are possible")
    dropped: Counter[str] = Counter()
    config = Trajectories(
        name=source.name, trajectories=lambda: _trajectories(source, drop_invalid, dropped), split=split
    )
    builder = UnifiedTrajectories(config=config, data_dir=str(data_dir), file_format="array_record")
    refuse_existing(Path(builder.data_path), "--name")
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(None):  # TFDS prints about downloads
        builder.download_and_prepare(download_dir=empty)
    return builder, dropped


def _trajectories(source: Source, drop_invalid: bool, dropped: Counter[str]) -> Iterator[Trajectory]:
    """Yields the trajectories of a source and counts the dropped rows."""
    for item in sources.read(source):
        match item.trajectory:
            case Trajectory() as trajectory:
                yield trajectory
            case InvalidTrajectory(reason=reason, detail=detail):
                if not drop_invalid:
                    raise UserError(
                        f"{item.where}: {reason}: {detail}; correct the line, or drop such lines with --drop-invalid"
                    )
                dropped[reason] += 1
            case sources.Filtered(reason):
                dropped[reason] += 1


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.Parser(
        prog="python -m xlam_jax.data.tfds_builder",
        description="Builds a TFDS dataset of trajectories, as ArrayRecord.",
    )
    parser.add_argument("--name", required=True, help="name of the configuration: unified_trajectories/NAME")
    parser.add_argument(
        "--files", required=True, nargs="+", metavar="FILE", help="like `files` of a source in a config"
    )
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="folder of TFDS datasets")
    parser.add_argument("--split", default="train", help="the split of the files (default: train)")
    parser.add_argument("--format", default="unified", help="format of the files' rows (default: unified)")
    parser.add_argument("--drop-invalid", action="store_true", help="drop rows that are not trajectories")
    options = parser.parse_args(arguments)
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    source = Source(name=options.name, files=options.files, format=options.format)
    builder, dropped = build(source, options.data_dir, split=options.split, drop_invalid=options.drop_invalid)
    count = builder.info.splits[options.split].num_examples
    print(f"{builder.data_path}: {count} trajectories, dropped: {counts_text(dropped)}")
    print(f"in a config: tfds: {builder.name}/{options.name}:{builder.version}, with TFDS_DATA_DIR={options.data_dir}")


if __name__ == "__main__":
    cli.run(main)
