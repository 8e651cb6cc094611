"""`python -m xlam_jax.train --config configs/NAME.yaml [section.key=value …]`: trains a model.

Running the same command again continues the run in its output_dir.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xlam_jax import cli
from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.export import check_export, export_after
from xlam_jax.parallel import distributed
from xlam_jax.parallel.link import Hosts
from xlam_jax.signals import Stop
from xlam_jax.training.facts import facts_of_data, facts_of_run
from xlam_jax.training.run_folder import CONFIG, RUN, begin_run, check_run_folder, read_run, writing
from xlam_jax.training.trackers import check_trackers

if TYPE_CHECKING:
    from xlam_jax.progress import Progress


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
        prog="python -m xlam_jax.train",
        description="Train a model as described in a config; run the same command again to continue.",
        epilog="fields of a config:\n" + configs.field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--print-config", action="store_true", help="show each value of the config and its origin")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the data, compile and time the step, report memory and time; write nothing",
    )
    parser.add_argument(
        "--profile", type=_steps, metavar="START:STOP", help="trace these steps for XProf, into output_dir/profile"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set")
    distributed.add_arguments(parser)
    return parser


def main() -> int:
    """Returns the exit code: 0, or `STOPPED` when a signal ended the run."""
    arguments = parser().parse_intermixed_args()
    resolved = check(arguments)
    if arguments.print_config:
        print(configs.describe(resolved))
        return 0
    run = Path(resolved.config.output_dir)
    place = distributed.find(arguments, os.environ)
    with_huge_pages()
    with Stop() as stop, distributed.join(place, arguments.join_timeout, facts_of_run(resolved)) as hosts:
        from xlam_jax.progress import Progress

        if arguments.dry_run:
            from xlam_jax.training.dry_run import dry_run

            return dry_run(resolved, quiet=not hosts.first)
        with Progress(quiet=not hosts.first) as progress, writing(run, resolved, hosts, progress.line):
            code = train(resolved, run, progress, hosts, stop, arguments.profile)
    return code or export_after(resolved.config, run, hosts)


def check(arguments: argparse.Namespace) -> Resolved:
    """Loads the config, and checks everything that needs neither data nor devices. Raises `UserError`."""
    resolved = configs.load(arguments.config, arguments.overrides)
    if not arguments.print_config:
        if resolved.config.data.added_tokens:
            from xlam_jax.data.tokenizer import with_added_tokens

            resolved = with_added_tokens(resolved)
        check_trackers(resolved.config.track)
        check_run_folder(Path(resolved.config.output_dir), resolved)
        check_export(resolved.config, Path(resolved.config.output_dir) / CONFIG)
    return resolved


def _steps(text: str) -> range:
    """Parses START:STOP, both inclusive."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 ≤ START ≤ STOP, such as 10:12")
    return range(int(first), int(last) + 1)


def with_huge_pages() -> None:
    """Restarts this program with transparent huge pages for malloc; the C library reads this setting only at start.

    XLA on CPUs allocates new memory in each step; page faults of small pages take up to a third of the step's time.
    """
    tunable = "glibc.malloc.hugetlb=1"
    present = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in present:
        os.environ["GLIBC_TUNABLES"] = f"{present}:{tunable}" if present else tunable
        os.execv(sys.executable, sys.orig_argv)


def train(
    resolved: Resolved, run: Path, progress: "Progress", hosts: Hosts, stop: Stop, profiled: range | None = None
) -> int:
    """Runs the training, top to bottom. Returns the exit code: `STOPPED` if `stop` ended the run."""
    from xlam_jax.data.identity import identify
    from xlam_jax.parallel.mesh import keep_cpu_threads
    from xlam_jax.training.setup import set_up
    from xlam_jax.training.start import open_start
    from xlam_jax.training.trainer import Trainer
    from xlam_jax.weights import run as weights
    from xlam_jax.weights.checkpoint import check_names

    config = resolved.config
    for line in resolved.warnings:
        progress.line(f"warning: {line}")
    earlier = read_run(run / RUN, progress.line)
    if threads := earlier.get("cpu_threads"):
        keep_cpu_threads(threads[hosts.process if len(threads) == hosts.count else 0], config.mesh.cpu_devices)
    start = open_start(resolved, run, hosts, progress.line)
    setup = set_up(resolved, progress)
    if config.train.epochs is not None:  # now replaced by a number of steps
        resolved, config = setup.resolved, setup.resolved.config
        check_run_folder(run, resolved)
        check_names(run, range(start.step + 1, config.train.steps + 1))
    identity = identify(setup.loaded, setup.tokenizer, config.data.tokenizer)
    distributed.agree(hosts, facts_of_data(identity))
    frozen = weights.frozen(resolved, start.base, setup.frozen, setup.dtype)
    trainer = Trainer(resolved, run, setup, frozen, identity, earlier, hosts, progress)
    if hosts.first:
        begin_run(run, resolved, start.source)
    distributed.check_shared(hosts, run / CONFIG)
    trainer.restore(start)
    del start  # the opened weights
    if trainer.is_complete:
        progress.line(f"{run} is finished: {trainer.start} of {config.train.steps} steps")
        return 0
    trainer.prepare()
    return trainer.run(stop, profiled)


if __name__ == "__main__":
    cli.run(main)
