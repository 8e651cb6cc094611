"""Hypothesis strategies: arbitrary JSON and invalid values, broken rows, and texts and arguments of trajectories."""

import copy
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["user", "assistant", "tool", "get_time", "call_0", "{}", '{"a": 1} x', b"", 10**400, (), "\ud800"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "function", "name", "arguments", "id", "type", "text", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)

PLAIN = st.text(alphabet="abc 1\n.é🥶", min_size=1, max_size=12).filter(str.strip)
"""Texts of turns."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
"""Arguments of calls."""


@st.composite
def broken(draw, row: dict) -> object:
    """Returns a row with up to four of its parts, at any depth, replaced by anything or removed."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 4))):
        at: Any = row
        while True:
            key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
            if not isinstance(at[key], dict | list) or not at[key] or draw(st.integers(0, 2)) == 0:
                break
            at = at[key]
        if draw(st.booleans()):
            at[key] = draw(JSON)
        else:
            del at[key]
        if not row:
            break
    return row
