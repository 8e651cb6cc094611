"""Colors and labels of the kinds of spans in `enums.SPAN_KINDS`, for pages and terminals."""

COLORS = {
    "prompt": "#bbbbbb",
    "thought": "#e69f00",
    "tool_call": "#0072b2",
    "arguments": "#56b4e9",
    "answer": "#009e73",
    "eos": "#cc79a7",
    "reasoning": "#f0e442",
}
"""A color per kind, which color-blind readers can distinguish too (Okabe and Ito, 2008)."""
TERMINAL_COLORS = {
    "thought": 222,
    "tool_call": 153,
    "arguments": 117,
    "answer": 157,
    "eos": 218,
    "reasoning": 228,
    "loss": 229,
}
"""xterm color numbers of the trained kinds; "loss" if the kind is not known."""


def label(kind: str) -> str:
    """Returns the name of a kind for readers."""
    return "end" if kind == "eos" else kind
