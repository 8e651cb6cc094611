"""Compares the tokens and loss masks of training tools with what chat templates and servers imply.

Thirty small conversations are prepared for training by xlam_jax and by each peer, with two public templates, and
compared with tokens that `_conformance_expected.py` derives from the templates with transformers alone. A row has a
defect if a tool raises, does not train a token that the model must write, trains one that it must not write, or has
other tokens. For xlam_jax, the calls that its wire format parses in the expected answers are compared as well.

Each peer runs in an environment of its own, `.conformance/PEER`, which `--install` creates. A peer that cannot be
installed or run is listed with the last line of its error.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import _conformance_table as table
from _conformance_compare import Defect, compare, turns
from _conformance_expected import TEMPLATES, Expected, expect, save_tokenizer, writable
from _conformance_rows import ROWS, Row

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".conformance"
OURS = "xlam_jax"
TORCH = "torch==2.13.0"
UV = "uv==0.13.9"


class Peer(NamedTuple):
    """A tool, and what is installed for it."""

    package: str
    version: str
    python: str = "3.11"
    torch: tuple[str, ...] = (TORCH,)
    """Packages of PyTorch, without their dependencies."""
    alone: bool = False
    """Whether the package is installed without its dependencies, for which `needs` are installed."""
    needs: tuple[str, ...] = ()


PEERS = {
    "trl": Peer("trl", "1.16.0"),
    # imports torchaudio, whose last version is for this PyTorch
    "llamafactory": Peer("llamafactory", "0.9.5", torch=("torch==2.11.0", "torchaudio==2.11.0")),
    "axolotl": Peer("axolotl", "0.19.0"),
    "nemo": Peer("nemo-automodel", "0.7.0"),
    # its extras are for TPUs and GPUs
    "maxtext": Peer(
        "maxtext", "0.2.5", python="3.12", torch=(), alone=True,
        needs=(
            "jax==0.11.1", "flax", "grain", "datasets", "transformers>=5.17", "ml_collections", "tiktoken",
            "sentencepiece", "pillow", "orbax-checkpoint", "omegaconf", "pydantic", "jinja2", "google-cloud-storage",
            "pathwaysutils",
        ),
    ),
}  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare tokens and loss masks of training tools.")
    parser.add_argument("--peers", default=",".join(PEERS), help="some of the peers (default: all); '' for none")
    parser.add_argument("--install", action="store_true", help="install the peers first, each in .conformance/PEER")
    parser.add_argument("--reuse", action="store_true", help="run no peer; compare what it wrote in the last run")
    parser.add_argument("--out", type=Path, help="folder for conformance.md and conformance.json")
    options = parser.parse_args()
    names = [name for name in options.peers.split(",") if name]
    if unknown := sorted(set(names) - set(PEERS)):
        parser.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}")
    failed = {name: error for name in names if options.install and (error := install(name))}
    jobs = {template: FOLDER / "jobs" / template for template in TEMPLATES}
    written = {template: write_job(template, job) for template, job in jobs.items()}
    columns: dict[str, dict[str, Any]] = {OURS: {"version": "this tree"}}
    columns[OURS]["results"] = {template: check_ours(*pair) for template, pair in written.items()}
    for name in names:
        error = failed.get(name, "") or ("" if options.reuse else run_peer(name, list(jobs.values())))
        columns[name] = {"version": PEERS[name].version, "results": {}, "error": error}
        for template, (tokenizer, expected) in written.items():
            file = jobs[template] / f"{name}.json"
            if not file.exists():
                columns[name]["error"] = error or "its answers are not saved"
                continue
            answer = json.loads(file.read_text(encoding="utf-8"))
            columns[name]["versions"] = answer["versions"]
            columns[name]["results"][template] = {
                row: check(right, answer["rows"][row], tokenizer) for row, right in expected.items()
            }
    text = table.render(columns, [row.name for row in ROWS], TEMPLATES)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "conformance.md").write_text(text, encoding="utf-8")
        (options.out / "conformance.json").write_text(json.dumps(_as_json(columns), indent=1) + "\n", encoding="utf-8")


def write_job(template: str, job: Path) -> tuple[Any, dict[str, Expected]]:
    """Writes the tokenizer and the rows for the peers. Returns (tokenizer, what is expected of each row)."""
    tokenizer = save_tokenizer(template, job / "tokenizer")
    rows = [writable(row, tokenizer.chat_template) for row in ROWS]
    (job / "rows.json").write_text(json.dumps([row._asdict() for row in rows]), encoding="utf-8")
    return tokenizer, {row.name: expect(row, tokenizer) for row in ROWS}


def check_ours(tokenizer: Any, expected: dict[str, Expected]) -> dict[str, list[Defect]]:
    """Returns the defects of xlam_jax for each row."""
    from xlam_jax.data.render import wire_of

    wire = wire_of(tokenizer)
    result: dict[str, list[Defect]] = {}
    for row in ROWS:
        right = expected[row.name]
        actual = _attempt_ours(writable(row, tokenizer.chat_template), tokenizer)
        result[row.name] = check(right, actual, tokenizer)
        for number, (answer, turn) in enumerate(zip(right.answers, right.turns, strict=True), start=1):
            parsed = wire.parse(answer, row.tools)
            calls = [{"name": call.name, "arguments": call.arguments} for call in parsed.calls or ()]
            wanted = [
                {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                for call in turn.get("tool_calls", [])
            ]
            texts = (parsed.reasoning.strip(), parsed.content.strip())
            wanted_texts = (turn.get("reasoning_content", ""), turn["content"] or "")
            if calls != wanted or texts != wanted_texts:
                result[row.name].append(Defect("parse", number, str((wanted, wanted_texts)), str((calls, texts))))
    return result


def _attempt_ours(row: Row, tokenizer: Any) -> dict[str, Any]:
    from xlam_jax.config import Loss
    from xlam_jax.data.parse import parse_trajectory
    from xlam_jax.data.render import render_all
    from xlam_jax.data.trajectory import InvalidTrajectory
    from xlam_jax.errors import UserError

    try:
        trajectory = parse_trajectory({"tools": row.tools, "conversation": row.messages}, row.name)
        loss = Loss(turns="last") if row.last_turn_only else Loss()
        rendered = render_all(trajectory, tokenizer, "native", loss)
    except (InvalidTrajectory, UserError) as error:
        return {"error": str(error)}
    return {"sequences": [(item.input_ids.tolist(), item.loss_mask.tolist()) for item in rendered]}


def check(right: Expected, actual: dict[str, Any], tokenizer: Any) -> list[Defect]:
    """Returns the defects of a row; `actual` has its `sequences` or the `error` that was raised."""
    if "error" in actual:
        kind = "unsupported" if actual["error"].startswith("Unsupported") else "raises"
        return [Defect(kind, 0, "", actual["error"])]
    return compare(turns(right.sequences), turns(actual["sequences"]), tokenizer.decode)


def run_peer(name: str, jobs: Sequence[Path]) -> str:
    """Runs a peer, which writes its answer into the folder of each job. Returns the last line of its error, or ""."""
    python = python_of(name)
    for job in jobs:
        (job / f"{name}.json").unlink(missing_ok=True)
    if not python.exists():
        return "not installed (--install)"
    script = Path(__file__).parent / "peers" / f"run_{name}.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    log = FOLDER / "jobs" / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([python, script, *jobs], env=environment, stdout=file, stderr=file, check=False)
    return _last_line(log.read_text(encoding="utf-8", errors="replace")) if done.returncode else ""


def python_of(name: str) -> Path:
    """Returns the interpreter of a peer: this one if it has the peer's version, as it may for trl."""
    peer = PEERS[name]
    if _installed(peer.package) and version(peer.package) == peer.version:
        return Path(sys.executable)
    return FOLDER / name / "bin/python"


def install(name: str) -> str:
    """Installs a peer into its environment. Returns the last line of the error, empty if there is none."""
    peer = PEERS[name]
    if python_of(name) == Path(sys.executable):
        return ""
    python = FOLDER / name / "bin/python"
    uv = FOLDER / "uv/bin/uv"
    target = [str(uv), "pip", "install", "--quiet", "--python", str(python)]
    index = os.environ.get("TORCH_CPU", "--index-url https://download.pytorch.org/whl/cpu").split()
    overrides = ["--override", str(ROOT / "benchmarks/peers/overrides.txt")]
    requirement = f"{peer.package}=={peer.version}"
    steps: list[list[str]] = []
    if not uv.exists():
        steps.append([sys.executable, "-m", "venv", str(FOLDER / "uv")])
        steps.append([str(FOLDER / "uv/bin/python"), "-m", "pip", "install", "--quiet", UV])
    if not python.exists():
        steps.append([str(uv), "venv", "--quiet", "--python", peer.python, str(FOLDER / name)])
    if peer.torch:
        steps.append([*target, "--no-deps", *index, *peer.torch])
        pins = FOLDER / f"{name}.txt"
        pins.write_text("".join(f"{requirement}+cpu\n" for requirement in peer.torch), encoding="utf-8")
        overrides += ["--override", str(pins)]
    needs = [*peer.needs] if peer.alone else [requirement]
    steps.append([*target, *overrides, *needs])
    if peer.alone:
        steps.append([*target, "--no-deps", requirement])
    return next((error for step in steps if (error := _attempt_step(step))), "")


def _attempt_step(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return _last_line(done.stderr + done.stdout) if done.returncode else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _as_json(columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: column | {"results": _as_dicts(column["results"])} for name, column in columns.items()}


def _as_dicts(results: dict[str, dict[str, list[Defect]]]) -> dict[str, Any]:
    return {
        template: {row: [defect._asdict() for defect in defects] for row, defects in actual.items()}
        for template, actual in results.items()
    }


if __name__ == "__main__":
    main()
