"""What hosts compare when a run starts: settings, code, the output folder and the newest checkpoint."""

import io
import shutil
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from support import deadline

from xlam_jax import config as configs
from xlam_jax.errors import UserError
from xlam_jax.launch import free_ports
from xlam_jax.parallel import distributed
from xlam_jax.parallel.distributed import agree, check_shared
from xlam_jax.parallel.hub import Hub
from xlam_jax.parallel.link import Hosts, Link
from xlam_jax.progress import Progress
from xlam_jax.training import run_folder
from xlam_jax.training.facts import code_digest, facts_of_run
from xlam_jax.training.restore import restore_newest
from xlam_jax.training.save import Checkpoints
from xlam_jax.weights import checkpoint


def together(values: list[Any], ask: Any) -> list[str | None]:
    """Calls `ask(hosts, value)` on one host per value; returns each host's error message, None for none."""
    port = free_ports()
    Hub(port, len(values), timeout=deadline(20))

    def one(process: int) -> str | None:
        hosts = Link(("localhost", port), process, len(values), timeout=deadline(20))
        try:
            ask(hosts, values[process])
        except UserError as error:
            return str(error)
        finally:
            hosts.close()
        return None

    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(one, range(len(values))))


def test_hosts_agree():
    assert together([{"a": [1, None], "b": 2.5}] * 3, agree) == [None] * 3
    agree(Hosts(), {"a": 1})


def test_hosts_that_differ_are_told_all_values_and_who_has_them():
    values = [{"same": 0, "rate": 0.1, "only": True}, {"same": 0, "rate": 0.2}, {"same": 0, "rate": 0.1}]
    name = socket.gethostname()
    assert set(together([*values, values[2]], agree)) == {
        "the hosts differ; start all of them with the same code, config and data:\n"
        f"  only: true on host 0 ({name}), missing on host 1 ({name}) and host 2 ({name}) and 1 more\n"
        f"  rate: 0.1 on host 0 ({name}) and host 2 ({name}) and 1 more, 0.2 on host 1 ({name})"
    }


def test_many_differences_are_counted():
    first, second = ({f"key {at:02}": at + host for at in range(15)} for host in range(2))
    message = together([first, second], agree)[0]
    assert message
    assert len(message.splitlines()) == 12
    assert message.endswith("\n  and 5 more")


def test_what_is_compared(short_config: Path, tmp_path: Path):
    def facts(*overrides: str) -> dict[str, Any]:
        return facts_of_run(configs.load(short_config, ["output_dir=x", *overrides]))

    reference = facts()
    for same in ("train.log_every=7", "data.cache=/elsewhere", "track.to=[tensorboard]"):
        assert facts(same) == reference
    differ = ("train.learning_rate=0.5", "seed=1", "mesh.tensor=2", "model.overrides.hidden_size=64", "output_dir=y")
    for other in differ:
        assert facts(other) != reference


def test_code_is_compared_by_content(tmp_path: Path):
    for name in ("xlam_jax/parallel", "converters"):
        (tmp_path / name).mkdir(parents=True)
    empty = code_digest(tmp_path)
    (tmp_path / "converters/one.py").write_text("1")
    first = code_digest(tmp_path)
    (tmp_path / "converters/one.py").write_text("2")
    assert len({empty, first, code_digest(tmp_path)}) == 3


def test_a_folder_that_one_host_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "LAG", 0.3)
    files = [tmp_path / str(host) / "config.yaml" for host in range(3)]
    for host in (0, 1):
        files[host].parent.mkdir()
        files[host].write_text("a")
    messages = together(list(files), check_shared)
    assert all(message and f"what host 0 writes is not seen by host 2 ({socket.gethostname()})" in message
               for message in messages)  # fmt: skip
    # a network file system may lag
    late = threading.Timer(0.1, lambda: (files[2].parent.mkdir(), files[2].write_text("a")))
    monkeypatch.setattr(distributed, "LAG", 5.0)
    late.start()
    assert together(list(files), check_shared) == [None] * 3


def test_the_newest_checkpoint_that_all_see_is_taken(tmp_path: Path):
    def seen(steps: Sequence[Sequence[int]]) -> tuple[list[int], list[str], list[str | None]]:
        runs = [tmp_path / "-".join(map(str, ("run", *own))) for own in steps]
        for run, own in zip(runs, steps, strict=True):
            for step in own:
                (run / "checkpoints" / str(step) / "params").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir(parents=True, exist_ok=True)  # incomplete
        taken, log = [], io.StringIO()

        def ask(hosts: Hosts, run: Path) -> None:
            taken.append(run_folder.newest_step(run, hosts, Progress(log, quiet=not hosts.first).line))

        messages = together(runs, ask)
        return taken, log.getvalue().splitlines(), messages

    assert seen([[], []]) == ([0, 0], [], [None, None])
    assert seen([[3, 6], [3, 6]]) == ([6, 6], [], [None, None])
    taken, reports, _ = seen([[3, 6], [3, 6, 9], [3, 6]])
    name = socket.gethostname()
    assert taken == [6, 6, 6]
    assert len(reports) == 1
    assert f"host 1 ({name}) sees 3, 6, 9" in reports[0]
    assert reports[0].endswith("continuing from 6, which all of them see")
    taken, _, messages = seen([[3, 6], []])
    assert taken == []
    assert all(message and f"host 1 ({name}) sees none); output_dir must be on a file system" in message
               for message in messages)  # fmt: skip


def test_hosts_fall_back_together(tmp_path: Path):
    """If one host finds a damaged checkpoint, all hosts take the older one."""
    saves = Checkpoints(tmp_path / "0", keep=2, metadata={})
    for step in (1, 2):
        saves.save(step, {"params": {"w": jnp.full(8, step)}}, {})
    saves.wait()
    saves.close()
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1/checkpoints/2/params/manifest.ocdbt").write_bytes(b"")
    restored, said = [], io.StringIO()

    def restore(hosts: Hosts, run: Path) -> None:
        report = Progress(said, quiet=not hosts.first).line
        items = {"params": {"w": jnp.zeros(8)}}
        restored.append(restore_newest(run, 2, items, on_damage="fallback", hosts=hosts, report=report))

    assert together([tmp_path / "0", tmp_path / "1"], restore) == [None, None]
    assert [(one.step, one.items["params"]["w"].tolist()) for one in restored] == [(1, [1] * 8)] * 2
    assert f"{tmp_path}/1/checkpoints/2 is damaged: params/w can't be read" in said.getvalue()
    assert checkpoint.whole_steps(tmp_path / "0") == [1]  # its first host renames for all
