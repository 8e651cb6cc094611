"""Checkpoints: the one place that knows Orbax.

A run folder, and a converted model alike, look so:

    config.json            the Hugging Face config of the model
    generation_config.json stop tokens and sampling defaults, where the source of the weights has them
    tokenizer/             the tokenizer with its chat template
    checkpoints/<step>/    Orbax: the items params, opt and data, and ema where a run keeps an average of its params;
                           with the run's configuration as metadata. evaluation.json: the metrics of its evaluation,
                           once that is complete

A step folder gets its name only once it is whole (Orbax writes beside and renames). Its metadata contain a checksum of
every array by value, digests of the tokenizer's files and of generation_config.json, and a digest of themselves;
everything that is read back is compared with them, and what differs raises `DamagedError`.
"""

import contextlib
import errno
import json
import logging
import math
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from xlam_jax import errors
from xlam_jax.digest import file_digest, hex_digest, json_digest
from xlam_jax.errors import UserError
from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config
from xlam_jax.models.params import Params
from xlam_jax.outputs import write_text
from xlam_jax.parallel.link import Hosts
from xlam_jax.training import checksums

# Orbax logs every phase of every save, and every error once a thread; what fails is raised by `save` and `wait`.
logging.getLogger("absl").setLevel(logging.CRITICAL)

STEPS = "checkpoints"
TOKENIZER = "tokenizer"
HF_CONFIG = "config.json"
METADATA = "_CHECKPOINT_METADATA"
EVALUATION = "evaluation.json"
ARRAYS, FILES, DIGEST, METRICS = "arrays", "files", "digest", "metrics"
"""What `save` adds to the metadata of a step: shape, dtype and checksums of each item's arrays; digests of files of the
run folder; a digest of the metadata; and, of earlier versions, the metric that the best checkpoint is chosen by."""
CHUNK = 2**25
"""Bytes of a chunk of a model that is written layer by layer, at most."""


LARGE = 2**24
"""Bytes of a parameter that is stored layer by layer; smaller ones take a chunk of each device's part."""


class DamagedError(UserError):
    """A step folder whose files are missing, can't be decoded, or contain other values than were saved."""

    def __init__(self, step_dir: Path, reason: str):
        self.problem = f"{step_dir} is damaged: {reason}"
        older = [str(step) for step in reversed(whole_steps(step_dir.parent.parent)) if str(step) != step_dir.name]
        advice = (
            f"give another step of this run ({', '.join(older)}), which is verified in turn"
            if older
            else "there is no other step here: train or convert again, or restore the folder from a copy"
        )
        super().__init__(f"{self.problem}; {advice}")


class Checkpoints:
    """Saves the checkpoints of one run in the background. Keeps the newest `keep` of them, and the one whose `best`
    metric is the best."""

    def __init__(self, run: Path, *, keep: int, metadata: dict[str, Any], best: str | None = None):
        _silence_orbax_threads()
        self._folder = run / STEPS
        self._metadata = metadata
        self._files = _digests(run)
        self._best, self._keep = best, keep
        self._orbax = ocp.training.Checkpointer(
            str(self._folder.absolute()),
            preservation_policy=self,
            step_name_format=_StepNames(),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None
        """Orbax's response to the last save, whose event loop stays open until its result is asked for."""
        self._metrics = {info.step: _saved_metrics(self._folder / str(info.step), info) for info in self._infos()}

    def steps(self) -> list[int]:
        """The steps that are kept, whole, in order."""
        return sorted(info.step for info in self._infos())

    def best(self) -> tuple[int, float] | None:
        """The step with the best metric, and the metric; None where no kept step has it."""
        return self._best_of(self.steps())

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which of the steps, in order, stay."""
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Which of the steps, in order, stay."""
        best = self._best_of(steps)
        return {*steps[-self._keep :], *([best[0]] if best else [])}

    def _best_of(self, steps: Sequence[int]) -> tuple[int, float] | None:
        name = self._best or ""
        values = {step: self._metrics[step][name] for step in steps if name in self._metrics.get(step, {})}
        if not values:
            return None
        step = max(values, key=lambda one: (values[one] if better(name, 1.0, 0.0) else -values[one], one))
        return step, values[step]

    def save(self, step: int, items: dict[str, Any], data: dict[str, Any]) -> None:
        """Starts saving trees of arrays by name; returns as soon as they are copied. All hosts call it together.

        Raises `UserError` when an earlier save failed.
        """
        self.wait()
        items = {**items, "data": {"states": _encode(data)}}
        metadata = self._metadata | {FILES: self._files, ARRAYS: _describe(items)}
        metadata |= {DIGEST: _digest(metadata)}
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _by_layers
        try:
            with context:
                self._saving = self._orbax.save_checkpointables_async(step, items, force=True, custom_metadata=metadata)
        except Exception as error:
            raise self._explain(error) from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step's evaluation next to its arrays, and removes the steps that then need not be
        kept. Waits for the save. All hosts call it together. Raises `UserError` when it can't be written."""
        self.wait()
        self._metrics[step] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            if jax.process_index() == 0:
                _write_evaluation(self._folder / str(step), self._metrics[step])
            steps = self.steps()
            for other in sorted({*steps} - self._kept(steps)):
                self._orbax.delete(other)
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Returns when the last save is whole. Raises `UserError` when it could not be written."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
            self._orbax.wait()
        except Exception as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Waits for the last save, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes it. After an error of this process alone a save that is under way is completed first; one of several
        hosts can't complete it without the others, and must not wait before it says why it ends."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.close()

    def _infos(self) -> Sequence[Any]:
        return self._orbax.checkpoints

    def _explain(self, error: Exception) -> Exception:
        """Turns what keeps a file from being written into a message; anything else stays what it is."""
        number = _system_error(error)
        if number not in errors.UNWRITABLE:
            return error
        problem, advice = errors.UNWRITABLE[number]
        whole = sorted(_steps(self._folder))
        kept = f"step {whole[-1]} is whole and stays" if whole else "no earlier checkpoint exists"
        free = f" ({shutil.disk_usage(self._folder).free / 1e6:.1f} MB free)" if number == errno.ENOSPC else ""
        return UserError(
            f"{self._folder}: {problem}{free}, the checkpoint could not be written; {kept}. {advice.capitalize()} and "
            "run the same command again to continue from there."
        )


class _StepNames:
    """Orbax's names of steps, restricted to step folders of ours: it neither counts nor deletes anything else."""

    def __init__(self) -> None:
        self._standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        return (one for one in self._standard.find_all(base_path) if _usable(Path(base_path) / one.path.name))

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._standard.find_step(base_path, step)


def _usable(step_dir: Path) -> bool:
    """Whether Orbax may see a step: metadata that are damaged make it fail. It may delete one that it began to."""
    try:
        load_metadata(step_dir)
    except DamagedError:
        return _is_step(step_dir) and not (step_dir / METADATA).exists()
    return True


def _write_evaluation(step_dir: Path, metrics: dict[str, float]) -> None:
    record: dict[str, Any] = {METRICS: metrics}
    write_text(step_dir / EVALUATION, json.dumps(record | {DIGEST: _digest(record)}, indent=1) + "\n")


def _read_evaluation(step_dir: Path) -> dict[str, float] | None:
    """The metrics of a step's evaluation; None where it is not complete, or the record is damaged (reported)."""
    file = step_dir / EVALUATION
    try:
        record = json.loads(file.read_bytes())
        if record[DIGEST] == _digest(record):
            return record[METRICS]
        problem = "its contents do not match their digest"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"[:300]
    print(f"warning: {file}: damaged, the metrics of this step are not known ({problem})", file=sys.stderr)
    return None


def is_evaluated(step_dir: Path) -> bool:
    """Whether the evaluation after a step is complete. Earlier versions evaluated before they saved."""
    metadata = load_metadata(step_dir)
    return METRICS in metadata or ARRAYS not in metadata or _read_evaluation(step_dir) is not None


def _saved_metrics(step_dir: Path, info: Any) -> dict[str, float]:
    """The metrics of a step's evaluation. Earlier versions had them in the metadata, or left them to Orbax."""
    metadata = load_metadata(step_dir) if (step_dir / METADATA).exists() else {}
    recorded = _read_evaluation(step_dir)
    return (metadata.get(METRICS, info.metrics) or {}) if recorded is None else recorded


def _named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their paths, joined by dots: what Orbax calls its arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(items: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksums of each array of each item."""
    arrays = {item: _named(tree) for item, tree in items.items()}
    sums = _sums(arrays)
    return {
        item: {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sums": sums[item][name]}
            for name, leaf in leaves.items()
        }
        for item, leaves in arrays.items()
    }


def _sums(arrays: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The checksums of each item's arrays, those on devices in one program."""
    on_devices = {
        item: {n: one for n, one in named.items() if isinstance(one, jax.Array)} for item, named in arrays.items()
    }
    flat = {f"{item}.{name}": one for item, named in on_devices.items() for name, one in named.items()}
    sums = checksums.of_tree(flat)
    return {
        item: {
            name: sums[f"{item}.{name}"] if name in on_devices[item] else checksums.of_array(name, one)
            for name, one in named.items()
        }
        for item, named in arrays.items()
    }


def _digest(metadata: dict[str, Any]) -> str:
    """A digest of metadata, however they are spelled in JSON."""
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    return json_digest(rest, length=32)


def _digests(run: Path) -> dict[str, str]:
    """Digests of the files beside the steps that an export reads, by their paths in the run folder; config.json is
    itself in the metadata."""
    files = [*sorted((run / TOKENIZER).iterdir())] if (run / TOKENIZER).is_dir() else []
    return {
        str(path.relative_to(run)): file_digest(path, length=32)
        for path in [*files, run / GENERATION_CONFIG]
        if path.is_file()
    }


class Restored(NamedTuple):
    """A step, read back and verified."""

    step: int
    items: dict[str, Any]
    data: dict[str, Any]
    metadata: dict[str, Any]


def restore(step_dir: Path, items: dict[str, Any]) -> Restored:
    """Reads a step and verifies it; `items` are trees of `jax.ShapeDtypeStruct`s that give shapes and shardings.

    Raises `DamagedError`, and `UserError` for a step of another model or optimizer.
    """
    restored = _read(step_dir, items)
    if reason := _differences(restored):
        raise DamagedError(step_dir, reason)
    return restored


def restore_newest(
    run: Path,
    newest: int,
    items: dict[str, Any],
    *,
    on_damage: Literal["fallback", "error"],
    hosts: Hosts,
    report: Callable[[str], None],
) -> Restored:
    """`restore` of the newest intact step up to `newest`; all `hosts` call it together and get the same one.

    A damaged newer step is reported and renamed to STEP.damaged: the run saves its number again. Raises `UserError`
    at the first damaged step where `on_damage` is "error", and where no step is intact; then nothing is renamed.
    """
    visible = [set(steps) for steps in hosts.gather(whole_steps(run))]
    problems: dict[int, str] = {}
    for step in sorted((step for step in set.intersection(*visible) if step <= newest), reverse=True):
        restored, problem = None, None
        try:
            restored = _read(run / STEPS / str(step), items, report)
        except DamagedError as error:
            problem = error.problem
        problem = next(filter(None, hosts.gather(problem)), None)
        if problem is None and restored is not None:  # of all hosts: the sums below are computed together
            reason = _differences(restored)
            if reason is None:
                _set_aside(run, problems, hosts, report)
                if problems:
                    report(f"continuing from {run / STEPS / str(step)}, the newest intact checkpoint")
                return restored
            problem = DamagedError(run / STEPS / str(step), reason).problem
        problems[step] = problem or ""
        if on_damage == "error":
            raise UserError(
                f"{problem}; set checkpoint.on_damage=fallback to continue from the newest intact checkpoint"
            )
    reasons = "\n  ".join(problems.values())
    raise UserError(
        f"{run / STEPS}: no checkpoint is intact; restore one from a copy, or start again in another output_dir\n"
        f"  {reasons}"
    )


def _set_aside(run: Path, problems: dict[int, str], hosts: Hosts, report: Callable[[str], None]) -> None:
    """Renames damaged steps, on one host, while all wait."""
    for step, problem in problems.items():
        path = run / STEPS / str(step)
        aside = path.with_name(f"{step}.damaged")
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = path.with_name(f"{step}.damaged-{number}")
        report(f"{problem}; it is kept as {aside.name}")
        if hosts.first:
            path.rename(aside)
    if problems:
        hosts.gather(None)


def _read(step_dir: Path, items: dict[str, Any], report: Callable[[str], None] | None = None) -> Restored:
    """Reads what belongs to this host's devices; of a host alone, not of all together."""
    metadata = load_metadata(step_dir)
    if ARRAYS in metadata:
        for item, tree in items.items():
            stored = {name: _Shaped(tuple(one["shape"])) for name, one in metadata[ARRAYS].get(item, {}).items()}
            same_shapes(step_dir / item, stored, _named(tree))
    else:
        _note_unverified(step_dir, report)

    def placed(item: str, path: Any, like: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stored = _open(step_dir, item, [name], metadata)[name]
        same_shapes(step_dir / item, {name: stored}, {name: like})
        return stored.unverified(like.sharding)

    loaded = {
        item: jax.tree_util.tree_map_with_path(lambda path, like, item=item: placed(item, path, like), tree)
        for item, tree in items.items()
    }
    states = _open(step_dir, "data", ["states"], metadata)["states"][...]
    try:
        data = _decode(states)
    except ValueError as error:
        raise DamagedError(step_dir, f"data: the position in the data can't be decoded ({error})") from None
    return Restored(int(step_dir.name), loaded, data, metadata)


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


def _differences(restored: Restored) -> str | None:
    """Which arrays differ from what was saved, or None. All hosts call it together."""
    saved = restored.metadata.get(ARRAYS)
    if saved is None:
        return None
    sums = _sums({item: _named(tree) for item, tree in restored.items.items()})
    different = [
        f"{item}/{name}"
        for item, named in sums.items()
        for name, value in named.items()
        if saved[item][name]["sums"] != value
    ]
    return _mismatch(different) if different else None


def _mismatch(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the values of {', '.join(names[:3])}{rest} differ from the checksums of what was saved"


def _by_layers(key: Any, value: Any) -> Any:
    """Large parameters are stored in chunks of a layer (and expert): an export reads them one after the other."""
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in key]
    if "blocks" not in names or value.nbytes < LARGE:
        return None
    lead = 2 if value.ndim == 4 and names[-1] in ("w1", "w2", "w3") else 1
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=tuple(range(lead)))


def better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another: losses and divergences are to be low, all else high."""
    return value < than if metric.endswith(("loss", "kl")) else value > than


def _silence_orbax_threads() -> None:
    """Keeps Python from printing what ends an Orbax thread: `save` and `wait` raise the same error where it is met."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("orbax."):
            usual(arguments)

    threading.excepthook = hook


def _system_error(error: BaseException | None) -> int | None:
    """The error number of the operating system in an error or its causes; TensorStore has it in its messages alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"(?:os_error_code='|OS error |Errno )(\d+)\b", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def _encode(data: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def _decode(states: Any) -> dict[str, Any]:
    return json.loads(np.asarray(states).tobytes().decode())


def whole_steps(run: Path) -> list[int]:
    """The steps of a run folder that are whole, in order; other entries of its checkpoints/ are ignored."""
    return sorted(_steps(run / STEPS))


def check_names(run: Path, steps: range) -> None:
    """Raises `UserError` when an entry that is not a step has the name of a step that the run is going to save."""
    for entry in (run / STEPS).iterdir() if (run / STEPS).is_dir() else ():
        if _is_number(entry.name) and int(entry.name) in steps and not _is_step(entry):
            raise UserError(
                f"{entry}: not a checkpoint, but it has the name of one that this run is going to save; move it away"
            )


def _steps(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if _is_step(entry)] if folder.is_dir() else []


def _is_step(entry: Path) -> bool:
    """Whether an entry of checkpoints/ is a step: named by its number alone, with metadata or parameters in it."""
    return _is_number(entry.name) and any((entry / name).exists() for name in (METADATA, "params", "ema"))


def _is_number(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def resolve(path: Path) -> Path:
    """The step folder meant by `path`: itself, or the newest whole one of a run folder.

    Raises `UserError` when there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; a run folder or one of its {STEPS}/STEP folders is expected")
    if _is_number(path.name) and path.parent.name == STEPS:
        return path
    steps = _steps(path / STEPS)
    if not steps:
        raise UserError(
            f"{path}: holds no {STEPS}/STEP folder; give a run folder, a step folder of one, or train first"
        )
    return path / STEPS / str(max(steps))


def load_metadata(step_dir: Path) -> dict[str, Any]:
    """What was saved with a step: the run's `config`, the `model`'s, the fingerprint of its `base`, and checksums.

    Raises `DamagedError` when it is missing, can't be parsed, or does not match its digest. A step of an earlier
    version has neither digest nor checksums.
    """
    return _metadata(step_dir)[1]


def _metadata(step_dir: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a step's items, and what was saved with it."""
    try:
        note = json.loads((step_dir / METADATA).read_bytes())
        items, custom = list(note["item_handlers"]), note["custom_metadata"] or {}
        signed = {ARRAYS, FILES, DIGEST, METRICS} & custom.keys()
        whole = not signed or custom[DIGEST] == _digest(custom)
    except PermissionError:
        raise
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DamagedError(
            step_dir, f"{METADATA} {'is missing' if missing else f'can not be read ({error})'}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(step_dir, f"{METADATA} can't be parsed ({type(error).__name__}: {error})"[:300]) from None
    if not whole:
        raise DamagedError(step_dir, f"the contents of {METADATA} do not match their digest")
    return items, custom


_noted: set[str] = set()


def _note_unverified(step_dir: Path, report: Callable[[str], None] | None = None) -> None:
    """Warns, once in a process, of a checkpoint without checksums."""
    if not _noted:
        _noted.add(str(step_dir))
        text = f"warning: {step_dir}: saved by an earlier version, without checksums: damage can't be detected"
        if report:
            report(text)
        else:
            print(text, file=sys.stderr)


def is_checkpoint(path: Path) -> bool:
    """Whether `resolve` would find a step here."""
    return (_is_number(path.name) and path.parent.name == STEPS) or bool(_steps(path / STEPS))


def load_params(step_dir: Path) -> Params:
    """The parameters of a step as numpy arrays; where the run kept a moving average of them, it is that.

    Raises `DamagedError`.
    """
    return jax.tree.map(np.asarray, open_params(step_dir))


def check_params(step_dir: Path, like: Any) -> None:
    """Raises `UserError` when the parameters of a step are not those of a model of these shapes; reads none of them."""
    same_shapes(step_dir, open_params(step_dir), like)


def stamp(step_dir: Path) -> str:
    """What tells a step from every other one, of other runs too; a copy has the same. Orbax notes the nanoseconds."""
    note = step_dir / METADATA
    held = note.read_bytes() if note.is_file() else str(step_dir.stat().st_mtime_ns).encode()
    return f"step {step_dir.name}, {hex_digest(held, length=16)}"


def same_shapes(folder: str | Path, stored: Any, wanted: Any) -> None:
    """Raises `UserError` naming the parameters whose shapes differ from those wanted."""
    shaped = lambda node: hasattr(node, "shape")  # noqa: E731
    has, needs = (
        {name: tuple(leaf.shape) for name, leaf in _named(tree, is_leaf=shaped).items()} for tree in (stored, wanted)
    )
    differences = [
        f"{name} is {has.get(name, 'missing')} in the checkpoint and {needs.get(name, 'unknown')} in the model"
        for name in sorted(has.keys() | needs.keys())
        if has.get(name) != needs.get(name)
    ]
    if differences:
        raise UserError(f"{folder}: a checkpoint of another model: " + "; ".join(differences[:5]))


def load_hf_config(step_dir: Path) -> dict[str, Any]:
    """The Hugging Face config of the model in a step folder.

    Raises `UserError` when it differs from the one that the step was saved with.
    """
    from xlam_jax.models.config import read_hf_config

    path = step_dir.parent.parent / HF_CONFIG
    hf_config = read_hf_config(path)
    saved = load_metadata(step_dir).get("model") or hf_config
    if not isinstance(saved, dict):
        raise DamagedError(step_dir, f"model in {METADATA} is a {type(saved).__name__}, not an object")
    different = [
        f"{key} is {hf_config.get(key)!r} there and {saved.get(key)!r} in the checkpoint"
        for key in sorted(saved.keys() | hf_config.keys())
        if saved.get(key) != hf_config.get(key)
    ]
    if different:
        raise UserError(
            f"{path}: not the config that {step_dir} was saved with: {'; '.join(different[:5])}; restore the file"
        )
    return hf_config


def load_generation_config(step_dir: Path) -> dict[str, Any] | None:
    """The generation config that the weights came with, next to a step folder; None where they came without.

    Raises `UserError` when it differs from what it was when the step was saved.
    """
    check_files(step_dir)
    return read_generation_config(step_dir.parent.parent / GENERATION_CONFIG)


def tokenizer_dir(step_dir: Path) -> Path | None:
    """The tokenizer kept beside a step folder, if there is one.

    Raises `UserError` when a file of it differs from what it was when the step was saved.
    """
    folder = step_dir.parent.parent / TOKENIZER
    check_files(step_dir)
    return folder if folder.is_dir() else None


def check_files(step_dir: Path) -> None:
    """Raises `UserError` when a file beside a step is not the one that it was saved with. Further files are fine."""
    run = step_dir.parent.parent
    now = _digests(run)
    files = load_metadata(step_dir).get(FILES, {})
    if not isinstance(files, dict):
        raise DamagedError(step_dir, f"{FILES} in {METADATA} is a {type(files).__name__}, not an object")
    for name, digest in files.items():
        if now.get(name) != digest:
            advice = f" (a run that is continued without {run / TOKENIZER} writes it again)"
            raise UserError(
                f"{run / name}: missing, damaged or changed since {step_dir} was saved; restore the file"
                + ("" if name == GENERATION_CONFIG else advice)
            )


class StoredParameter:
    """One of a step's parameters, read by its layers when they are asked for, and verified as they are read."""

    def __init__(self, step_dir: Path, item: str, name: str, store: Any, sums: str | None = None, dtype: Any = None):
        """`sums`: its checksums, where the metadata have them."""
        self._step_dir, self._item, self._name, self._store, self._sums = step_dir, item, name, store, sums
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(dtype or store.dtype.numpy_dtype)
        self.size, self.ndim = math.prod(self.shape), len(self.shape)

    def astype(self, dtype: Any) -> "StoredParameter":
        """The same, converted when it is read."""
        return StoredParameter(self._step_dir, self._item, self._name, self._store, self._sums, dtype)

    def __getitem__(self, at: Any) -> np.ndarray:
        """A slice by integers and slices; the layers that it lies in are read whole. Raises `DamagedError`."""
        at = () if at is Ellipsis else at if isinstance(at, tuple) else (at,)
        if self._sums is None:
            return self._raw(at).astype(self.dtype, copy=False)
        lead = checksums.leading_axes(self._name, self.ndim)
        units = self._raw(at[:lead])
        indices = np.arange(math.prod(self.shape[:lead])).reshape(self.shape[:lead])[at[:lead]]
        flat = units.reshape(indices.size, *self.shape[lead:])
        for unit, values in zip(indices.reshape(-1), flat, strict=True):
            if checksums.of_unit(values) != self._sums[16 * unit : 16 * unit + 16]:
                raise DamagedError(self._step_dir, _mismatch([f"{self._item}/{self._name}"]))
        return units[(slice(None),) * indices.ndim + at[lead:]].astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return self[...].astype(dtype or self.dtype, copy=False)

    def placed(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Laid out over the devices: each host reads what belongs to its own. All hosts call it together."""
        array = self.unverified(sharding)
        if self._sums is not None and checksums.of_tree({self._name: array})[self._name] != self._sums:
            raise DamagedError(self._step_dir, _mismatch([f"{self._item}/{self._name}"]))
        return array if array.dtype == self.dtype else jax.device_put(array.astype(self.dtype), sharding)

    def unverified(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """`placed` in the dtype of the file, before the comparison that takes all hosts."""
        return jax.make_array_from_callback(self.shape, sharding, self._raw)

    def _raw(self, at: Any) -> np.ndarray:
        try:
            return self._store[at].read().result()
        except ValueError as error:
            raise _unreadable(self._step_dir, f"{self._item}/{self._name}", error) from None


def open_params(step_dir: Path) -> Params:
    """The parameters of a step as `load_params` has them, none of them read yet: `StoredParameter`s. Raises
    `DamagedError`."""
    items, metadata = _metadata(step_dir)
    if ARRAYS not in metadata:
        _note_unverified(step_dir)
    items = metadata.get(ARRAYS, items)
    item = "ema" if "ema" in items else "params"
    names = list(metadata[ARRAYS][item]) if ARRAYS in metadata else _stored_names(step_dir, item)
    params: Params = {}
    for name, stored in _open(step_dir, item, names, metadata).items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = stored
    return params


def _stored_names(step_dir: Path, item: str) -> list[str]:
    """The arrays that Orbax names in an item."""
    form = _form(step_dir, item)
    try:
        return [".".join(key["key"] for key in one["key_metadata"]) for one in form["tree_metadata"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(step_dir, f"{item}/_METADATA can't be parsed ({error!r})") from None


def _form(step_dir: Path, item: str) -> dict[str, Any]:
    """What Orbax says of how an item is stored."""
    try:
        form = json.loads((step_dir / item / "_METADATA").read_bytes())
        if not {"use_ocdbt", "use_zarr3"} <= form.keys():
            raise KeyError("use_ocdbt, use_zarr3")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(step_dir, f"{item}/_METADATA can't be read ({error})") from None
    return form


def _open(step_dir: Path, item: str, names: list[str], metadata: dict[str, Any]) -> dict[str, StoredParameter]:
    """Opens arrays of an item by their names. Raises `DamagedError` when one can't be opened, or has another shape or
    dtype than was saved.

    They are opened by TensorStore, as Orbax lays them out: one zarr array each, in one store of keys or a folder each.
    """
    import tensorstore

    folder, form = (step_dir / item).absolute(), _form(step_dir, item)
    saved = metadata[ARRAYS][item] if ARRAYS in metadata else {}
    pending = {}
    for name in names:
        at = (
            {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
            if form["use_ocdbt"]
            else {"driver": "file", "path": f"{folder}/{name}/"}
        )
        spec = {"driver": "zarr3" if form["use_zarr3"] else "zarr", "kvstore": at, "recheck_cached_data": False}
        spec["fill_missing_data_reads"] = False  # a lost file is an error, and not zeros
        pending[name] = tensorstore.open(spec, read=True)
    opened = {}
    for name, future in pending.items():
        try:
            store = future.result()
        except ValueError as error:
            raise _unreadable(step_dir, f"{item}/{name}", error) from None
        stored = StoredParameter(step_dir, item, name, store, saved.get(name, {}).get("sums"))
        if name in saved and (list(stored.shape), str(stored.dtype)) != (saved[name]["shape"], saved[name]["dtype"]):
            raise DamagedError(
                step_dir,
                f"{item}/{name} is {stored.dtype} {stored.shape}, and was saved as {saved[name]['dtype']} "
                f"{tuple(saved[name]['shape'])}",
            )
        opened[name] = stored
    return opened


_TRANSIENT = (errno.EPERM, errno.ENOMEM, errno.EACCES, errno.ENFILE, errno.EMFILE)


def _unreadable(step_dir: Path, name: str, error: Exception) -> UserError:
    """Damage, or what keeps an undamaged file from being read."""
    reason = str(error).strip().splitlines()[0][:300]
    if "PERMISSION_DENIED" in reason or _system_error(error) in _TRANSIENT:
        return UserError(f"{step_dir / name}: can't be read ({reason})")
    return DamagedError(step_dir, f"{name} can't be read ({reason})")


class NewModel:
    """A model alone, written layer by layer as step 0 of a folder of the same shape as a run's.

    Orbax makes the step, with arrays of one element; then TensorStore makes each anew in its true shape: a folder of
    uncompressed zarr chunks with checksums, none of which spans two layers (or experts).
    """

    def __init__(self, folder: Path, like: Params, split: Callable[[tuple[str, ...]], int]):
        """Begins one in `folder`, or goes on with it. `like`: shapes and dtypes. `split`: of a parameter's path, how
        many leading axes index its layers."""
        self._folder = (folder / STEPS / "0").absolute()
        if not self._folder.is_dir():
            context = ocp.Context()
            context.array.saving.use_ocdbt = False
            leaf = lambda node: not isinstance(node, dict)  # noqa: E731
            # the chunks have checksums of their own
            arrays = {
                name: {"shape": list(one.shape), "dtype": str(one.dtype)} for name, one in _named(like, leaf).items()
            }
            metadata = {"model": json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))}
            metadata |= {ARRAYS: {"params": arrays}, FILES: {}}
            metadata |= {DIGEST: _digest(metadata)}
            with context:
                tiny = jax.tree.map(lambda one: np.zeros((1,), one.dtype), like, is_leaf=leaf)
                ocp.save_checkpointables(str(self._folder), {"params": tiny}, custom_metadata=metadata)
        self._split = split
        self._stores: dict[tuple[str, ...], Any] = {}
        self._like = like

    def open(self, path: tuple[str, ...]) -> None:
        """Opens a parameter; made anew where it is not whole in its true shape yet."""
        import tensorstore

        one: Any = self._like
        for name in path:
            one = one[name]
        lead = self._split(path)
        rows = max(1, CHUNK // (math.prod(one.shape[lead + 1 :]) * one.dtype.itemsize))
        chunk = [1] * lead + [min(rows, one.shape[lead]), *one.shape[lead + 1 :]]
        at = self._folder / "params" / ".".join(path)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{at}/"},
            "metadata": {
                "shape": list(one.shape),
                "data_type": str(one.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            "context": {"file_io_sync": False},
            "store_data_equal_to_fill_value": True,
        }
        described = json.loads((at / "zarr.json").read_text(encoding="utf-8"))
        if described["shape"] != list(one.shape) or described["chunk_grid"]["configuration"]["chunk_shape"] != chunk:
            shutil.rmtree(at)
        self._stores[path] = tensorstore.open(spec, create=True, open=True).result()

    def write(self, path: tuple[str, ...], at: tuple[int, ...], layer: np.ndarray) -> None:
        """Writes a layer; returns when it is in its files."""
        self._stores[path][at].write(layer).result()


def write_hf_config(folder: Path, hf_config: dict[str, Any]) -> None:
    """Writes `config.json` into a folder, beside and renamed."""
    write_text(folder / HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: the target of a restore."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
