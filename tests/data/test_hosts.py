"""The global batches of a mixture on 1, 2 and 4 hosts: each host a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xlam_jax.config import Data

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
DATA = Data.model_validate(
    {
        "sources": [
            {"name": name, "files": [str(QUICKSTART / f"{name}.jsonl")], "weight": weight, "limit": 40}
            for name, weight in (("hammer", 3.0), ("seal_tools", 2.0), ("webshop", 0.7))
        ],
        "tokenizer": str(QUICKSTART / "tokenizer"),
        "sequence_length": 1024,
        "streams": 4,
        "packing_bins": 4,
    }
)
HOST = """
import json, sys
import numpy as np
from xlam_jax.config import Data
from xlam_jax.data import corpus, pipeline
from xlam_jax.data.tokenizer import load_tokenizer

data, host, hosts, batches, out, state = json.loads(sys.argv[1])
data = Data.model_validate(data)
loader = pipeline.Loader(
    corpus.load(data, load_tokenizer(data.tokenizer)), data, batch_size=8, seed=5,
    rows=range(host * 8 // hosts, (host + 1) * 8 // hosts)
)
if state is not None:
    loader.restore(state)
rows = [next(loader) for _ in range(batches)]
columns = {f"{at}.{name}": column for at, row in enumerate(rows) for name, column in row._asdict().items()}
np.savez(out, **{name: column for name, column in columns.items() if column is not None})
with open(out + ".json", "w") as file:
    json.dump(loader.state(), file)
"""


def run(folder: Path, hosts: int, batches: int, state: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Global batches by name, and the state of all streams after them."""
    outs = [str(folder / f"{hosts}-{host}-{state is None}.npz") for host in range(hosts)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, json.dumps([DATA.model_dump(), host, hosts, batches, out, state])]
        )
        for host, out in enumerate(outs)
    ]
    assert [process.wait(120) for process in processes] == [0] * hosts
    parts = [np.load(out) for out in outs]
    states: dict = {}
    for out in outs:
        states |= json.loads(Path(out + ".json").read_text(encoding="utf-8"))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}, states


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, np.ndarray], dict, dict[str, np.ndarray]]:
    """Six batches of one host, its state after them, and four more."""
    folder = tmp_path_factory.mktemp("one")
    first, state = run(folder, 1, 6)
    return first, state, run(folder, 1, 4, state)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "then"), [(2, 4), (4, 1)])
def test_hosts_and_resume_on_other_hosts(whole, tmp_path: Path, hosts: int, then: int):
    first, state, second = whole
    batches, states = run(tmp_path, hosts, 6)
    assert batches.keys() == first.keys()
    assert all(np.array_equal(batches[name], first[name]) for name in first)
    assert states == state
    after, _ = run(tmp_path, then, 4, states)
    assert all(np.array_equal(after[name], second[name]) for name in second)
