import json
from pathlib import Path

import pytest

from xlam_jax.data.converters import converter
from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.tokenizer import load_tokenizer, save
from xlam_jax.data.trajectory import Trajectory

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
SOURCES = ("webshop", "hotpotqa", "seal_tools", "hammer")
TOKENIZERS = ("mistral:v1", "mistral:v3", str(QUICKSTART / "tokenizer"))


@pytest.fixture(scope="session")
def quickstart() -> Path:
    return QUICKSTART


@pytest.fixture(scope="session")
def bundled() -> list[Trajectory]:
    """Every bundled trajectory."""
    rows = [row for source in SOURCES for _, row in read_jsonl(QUICKSTART / f"{source}.jsonl")]
    assert all(isinstance(row, Trajectory) for row in rows)
    return rows  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="session", params=TOKENIZERS, ids=("v1", "v3", "quickstart"))
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="session")
def reloaded(tokenizer, tmp_path_factory):
    """The tokenizer of a server: saved, and loaded by transformers alone."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def row() -> dict:
    """A trajectory with a thought and parallel calls, two consecutive results, a call alone and text alone."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    names = ("get_weather", "get_time")
    return {
        "unique_trajectory_id": "weather_0",
        "source": "made",
        "score": 1.0,
        "task_instruction": "Help with the weather.",
        "tools": [
            {"type": "function", "function": {"name": name, "description": "Où? <&> 北", "parameters": parameters}}
            for name in names
        ],
        "conversation": [
            {"role": "user", "content": "Weather and time in Tromsø?"},
            {
                "role": "assistant",
                "content": "I look up both.\n\nFirst the weather: [{",
                "tool_calls": [
                    {"type": "function", "id": f"call_{i}", "function": {"name": name, "arguments": arguments}}
                    for i, (name, arguments) in enumerate(
                        zip(names, ({"city": "Tromsø", "a": [1, 2.5, None, {"z": "'\"\\\n"}]}, {}), strict=True)
                    )
                ],
            },
            {"role": "tool", "tool_call_id": "call_0", "name": "get_weather", "content": '{"t": -3}'},
            {"role": "tool", "tool_call_id": "call_1", "name": "get_time", "content": ""},
            {"role": "assistant", "content": "-3 °C 🥶, 12:00."},
            {"role": "user", "content": "  thanks \n"},
            {"role": "user", "content": "1"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {"city": "x"}}}],
            },
        ],
    }


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(
            b"".join((r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode()) + b"\n" for r in rows)
        )
        return path

    return write


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Converts rows of a format; returns (trajectories, (row, unit, reason) of dropped ones, repairs)."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def run(name: str, *rows: object) -> tuple[list[Trajectory], list[tuple[int, str, str]], list[str]]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        items = list(converter(name)([path]))
        kept = [item for item in items if isinstance(item, Converted)]
        dropped = [(item.row, item.unit, item.reason) for item in items if isinstance(item, Dropped)]
        return [item.trajectory for item in kept], dropped, [note.reason for item in kept for note in item.repairs]

    return run
