"""The run folder: who may write to it, what it already contains, and the files that describe the run."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlam_jax import config as configs
from xlam_jax.config import Config, Resolved
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.outputs import LOCK, PART, locked, remove_parts, write_text
from xlam_jax.parallel.link import Hosts, host_name

if TYPE_CHECKING:
    from xlam_jax.training.setup import Setup

CONFIG = "config.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"

Report = Callable[[str], None]


@contextlib.contextmanager
def writing(run: Path, resolved: Resolved, hosts: Hosts, report: Report) -> Iterator[None]:
    """Locks the run folder against other runs, and creates it if it is missing. Raises `UserError` if another run has
    the lock."""
    if not hosts.first:  # host 0 has the lock for all hosts, and ends all of them if it can't have it
        yield
        return
    with locked(run, "output_dir", report):
        check_run_folder(run, resolved)  # another run may have finished there since the first check
        yield


def check_run_folder(run: Path, resolved: Resolved) -> None:
    """Raises `UserError` when the folder contains a run of another config, or anything that is not a run."""
    from xlam_jax.models.config import read_hf_config

    saved = run / CONFIG
    if not saved.exists():
        if run.exists() and (not run.is_dir() or any(not _is_leftover(entry) for entry in run.iterdir())):
            raise UserError(f"output_dir: {run} exists and is not a run of this program; choose another folder")
        return
    try:
        old = configs.read_saved(saved)
    except UserError as error:
        raise UserError(f"{error}, or choose another output_dir") from None
    different = configs.differences(old, resolved.config)
    new_hf = resolved.hf_config
    old_hf = read_hf_config(run / "config.json") if (run / "config.json").exists() else new_hf  # killed before it wrote
    different += [
        f"{resolved.config.model.config}: {key} is {old_hf.get(key)!r} in the run, {new_hf.get(key)!r} now"
        for key in sorted(old_hf.keys() | new_hf.keys())
        if old_hf.get(key) != new_hf.get(key)
    ]
    if different:
        raise UserError(
            f"output_dir: {run} contains a run of another config; choose another folder, or change back\n  "
            + "\n  ".join(sorted(different))
        )


def _is_leftover(entry: Path) -> bool:
    """Returns whether a run that was killed before it wrote its config may have left this file."""
    return entry.suffix == PART or entry.name == LOCK


def newest_step(run: Path, hosts: Hosts, report: Report) -> int:
    """Returns the newest complete step that all hosts see; 0 for none.

    Raises `UserError` when some hosts see steps and no step is seen by all.
    """
    from xlam_jax.weights.checkpoint import whole_steps

    visible = [set(steps) for steps in hosts.gather(whole_steps(run))]
    common = max(set.intersection(*visible), default=0)
    if len(set(map(frozenset, visible))) > 1:
        by_host = "; ".join(
            f"{host_name(process, hosts.names[process])} sees {', '.join(map(str, sorted(steps))) or 'none'}"
            for process, steps in enumerate(visible)
        )
        where = f"{run / STEPS_FOLDER}: the hosts see different checkpoints ({by_host})"
        if not common:
            raise UserError(f"{where}; output_dir must be on a file system that all of them share")
        report(f"{where}; continuing from {common}, which all of them see")
    return common


def begin_run(run: Path, resolved: Resolved, source: Path | None) -> None:
    """Writes the first files of a run. `source`: the folder next to the weights that it starts from.

    The config is written first: it identifies the run, should it be killed before the rest is written.
    """
    from xlam_jax.models.generation_config import copy_generation_config
    from xlam_jax.weights.checkpoint import write_hf_config

    run.mkdir(parents=True, exist_ok=True)
    remove_parts(run)
    write_text(run / CONFIG, configs.to_yaml(resolved.config))
    write_hf_config(run, resolved.hf_config)
    if source is not None:
        copy_generation_config(source, run)


def read_run(file: Path, report: Report) -> dict[str, Any]:
    """Reads run.json; returns {} if it is missing, or if it is unreadable, which is reported."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(about, dict) and all(map(_is_list, (about.get(key, []) for key in ("started", "data_changes")))):
            threads = about.get("cpu_threads") or []
            if _is_list(threads) and all(type(count) is int and count > 0 for count in threads):
                return about
        problem = "not a JSON object as this program writes it"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problem = str(error)
    report(f"warning: {file}: can't be read ({problem}); it is written again, without the times of earlier starts")
    return {}


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def write_run(
    run: Path, config: Config, setup: "Setup", earlier: Mapping[str, Any], *, cpu_threads: Any, data_changes: list[Any]
) -> None:
    """Writes run.json, which describes a run for reports, in addition to its metrics.

    `earlier`: run.json of an earlier start, to whose `started` this start is added. `data_changes`: records of
    `resume.check_data`.
    """
    about = _describe(config, setup) | {
        "started": [*earlier.get("started", []), datetime.now(UTC).isoformat(timespec="seconds")],
        "cpu_threads": cpu_threads,
        "data_changes": data_changes,
    }
    write_text(run / RUN, json.dumps(about, indent=1) + "\n")


def _describe(config: Config, setup: "Setup") -> dict[str, Any]:
    import jax

    from xlam_jax.data import examples
    from xlam_jax.data.mixture import shares
    from xlam_jax.training import cost

    model, device = setup.model, jax.devices()[0]
    trained = sum(cost.trainable_sizes(model).values())
    return {
        "parameters": model.parameters() + (trained if model.lora else 0),
        "trainable_parameters": trained,
        "devices": len(jax.devices()),
        "device_kind": device.device_kind,
        "flops_per_token": cost.flops_per_token(model, config.data.sequence_length),
        "peak_flops_per_device": cost.peak_flops(device.device_kind),
        "batch_places": config.train.batch_size * config.data.sequence_length,
        "sources": {
            loaded.source.name: {
                "target_share": float(share),
                "trajectories": len(loaded.train),
                "trained_tokens": int(examples.trained(loaded.train).sum()),
            }
            for loaded, share in zip(setup.loaded, shares(setup.loaded, config.data), strict=True)
        },
    }
