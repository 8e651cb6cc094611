"""Properties of every importer of environments' logs: calls fit their tools, and any row is converted or named."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from conversions import run
from environment_logs import FILES, FIXTURES, TOOLS, files
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from xlam_jax.data.converters import CONVERTERS
from xlam_jax.data.converters.common import Converted
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import to_dict


@pytest.mark.parametrize("name", FILES)
def test_calls_fit_their_tools(name):
    kept, _, _ = run(name, *files(name))
    assert len({trajectory.id for trajectory in kept}) == len(kept)
    misfits: Counter[str] = Counter()
    for trajectory in kept:
        assert trajectory.source == name
        assert trajectory.task_instruction
        assert parse_trajectory(to_dict(trajectory)) == trajectory
        assert trajectory.conversation[-1].role == "assistant"
        results = [m.tool_call_id for m in trajectory.conversation if m.role == "tool"]
        assert len(set(results)) == len(results)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in trajectory.tools}
        for schema in schemas.values():
            Draft202012Validator.check_schema(schema)
        for message in trajectory.conversation:
            for call in message.tool_calls:
                strict = Draft202012Validator(schemas[call.name] | {"additionalProperties": False})
                misfits[call.name] += not strict.is_valid(call.arguments)
    in_the_source = {"toolalpaca": {"searchAnime": 1}, "api_bank": {"AddMeeting": 1, "CancelTimedSwitch": 1}}
    assert +misfits == in_the_source.get(name, {})


@pytest.mark.parametrize("name", FILES)
def test_bad_rows_are_named(name, write_jsonl):
    path = write_jsonl(b"{", [], {}, {"state": 1, "environment": 1, "traj": [1], "Documentation": 1, "turns": [1]})
    kept, dropped, _ = run(name, path, *([FIXTURES / name / TOOLS[name]] if name in TOOLS else []))
    assert kept == []
    assert [row for _, row, _ in dropped] == [1, 2, 3, 4]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Returns the path to everything in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*at, key), *places(inner, (*at, key))]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_is_converted_or_named(name, folder, data):
    rows = [row for path in files(name) for row in load(path)]
    row = copy.deepcopy(data.draw(st.sampled_from(rows)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(row)))
        holder = row
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = data.draw(JSON)
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    items = list(CONVERTERS[name]([path, *([FIXTURES / name / TOOLS[name]] if name in TOOLS else [])]))
    assert any(isinstance(item, Converted) or item.unit == "trajectory" for item in items)
    for item in items:
        if isinstance(item, Converted):
            assert parse_trajectory(to_dict(item.trajectory)) == item.trajectory


def load(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    document = json.loads(path.read_text())
    return list(document.values()) if isinstance(document, dict) else document
