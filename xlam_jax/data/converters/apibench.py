"""APIBench: requests and the call that loads a fitting model (Patil et al. 2023, Gorilla, arXiv:2305.15334).

Raw, torchhub_train.json: each line is {"code", "api_call", "provider", "api_data": the API's documentation}. "code" is
text like a Python dict, {'Instruction': …, 'Output': {'domain', 'api_call', 'explanation', 'code'}}, whose quotes do
not match; "api_call" is a Python call such as torch.hub.load(repo_or_dir='pytorch/vision', model='resnet18',
pretrained=True). In torchhub_eval.json "code" has headings instead: ###Instruction: …, ###Input: …, ###Output: {…}.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data import literals
from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    StepDropped,
    call,
    convert_one,
    field,
    tool,
)
from xlam_jax.data.files import read_lines
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory

FUNCTION = "torch.hub.load"
NAME = "torch_hub_load"
"""The tool's name; servers do not accept dots in names."""
INSTRUCTION = "Choose the model on PyTorch Hub that fits the user's request best, and load it."
TOOL = tool(
    NAME,
    "Load a model from PyTorch Hub. Further arguments are passed on to the repository's entry point by name.",
    {
        "repo_or_dir": {"type": "string", "description": "The GitHub repository, owner/name, or owner/name:branch."},
        "model": {"type": "string", "description": "The entry point in the repository."},
        "args": {"type": "array", "description": "Arguments that are passed on to the entry point without a name."},
        "pretrained": {"type": "boolean", "description": "Load trained weights."},
        "force_reload": {"type": "boolean", "description": "Download the repository even if it is there already."},
    },
    ["repo_or_dir", "model"],
)
TOOL["function"]["parameters"]["additionalProperties"] = True
_INSTRUCTION = re.compile(r"\s*(?:\{\s*'Instruction'\s*:|###\s*Instruction\s*:)")
_INPUT = re.compile(r",\s*'Input'\s*:|\s###\s*Input\s*:")
_OUTPUT = re.compile(r",\s*'Output'\s*:|\s###\s*Output\s*:")
_EXPLANATION = re.compile(r"""'explanation'\s*:\s*(["'])(.*?)\1\s*+(?:,\s*'code'|\}*+\s*$)""", re.DOTALL)
_NAMED_BEFORE_UNNAMED = re.compile(r"""repo_or_dir=(("|')[^"']*\2\s*,\s*)(("|')[^"']*\4\s*,\s*)model=""")


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts the instruction to a user turn, and the answer to a call of a tool for `torch.hub.load`.

    The explanation is the thought. The answer is "api_call" rather than the answer's code, because the benchmark scores
    the former, and it is complete where the code is not. The documentation is dropped, because it would reveal the
    answer. An explanation of another call than "api_call" is dropped as a step.
    Repaired: an entry point without a name after repo_or_dir=, together with an argument `model` of the entry point
    (nameless-after-named; the latter becomes `args`).
    Dropped: calls with variables as values (placeholder-argument), without a model or of other functions, and answers
    without a call (no-answer).
    """
    for path in paths:
        for number, line in read_lines(path):
            yield from convert_one(path, number, _row(line), convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one row."""
    code = field(row, "code", str)
    text = field(row, "api_call", str)
    start, end = _INSTRUCTION.match(code), _OUTPUT.search(code)
    if not start or not end:
        raise InvalidTrajectory(
            "no-instruction",
            f"`code` does not begin {{'Instruction': …, 'Output': …, nor ###Instruction: … ###Output: {code[:200]}",
        )
    output = code[end.end() :]
    if FUNCTION not in output:
        raise InvalidTrajectory("no-answer", f"the output loads no model: {output[:200]}")
    plain = _NAMED_BEFORE_UNNAMED.sub(r"\1\3", text)
    if plain != text:
        yield Repaired("nameless-after-named", text)
    arguments = _arguments(plain)
    thought = _explanation(output)
    named = [arguments["repo_or_dir"], arguments["model"], *arguments.get("args", [])]
    if thought and not all(f"'{value}'" in output or f'"{value}"' in output for value in named):
        yield StepDropped("explanation-of-another-call", f"{text} is explained by {output[:400]}")
        thought = ""
    yield {
        "unique_trajectory_id": f"apibench_{name}",
        "source": "apibench",
        "task_instruction": INSTRUCTION,
        "tools": [TOOL],
        "conversation": [
            {"role": "user", "content": _request(code[start.end() : end.start()])},
            {"role": "assistant", "content": thought, "tool_calls": [call(1, NAME, arguments)]},
        ],
    }


def _row(line: bytes) -> dict[str, Any] | InvalidTrajectory:
    try:
        row = parse_json(line)
    except InvalidTrajectory as invalid:
        return invalid
    if not isinstance(row, dict):
        return InvalidTrajectory("not-an-object", f"a row is a JSON object, got a {type(row).__name__}")
    return row


def _arguments(text: str) -> dict[str, Any]:
    """Returns the arguments of a Python call by name; `args` has the entry point's arguments without a name."""
    try:
        node = literals.expression(text)
    except ValueError as error:
        raise InvalidTrajectory("bad-call", f"{text[:200]}: {error}") from None
    match node:
        case ast.Call(func=ast.Attribute(ast.Attribute(ast.Name("torch"), "hub"), "load")):
            pass
        case _:
            raise InvalidTrajectory("unknown-function", f"{text[:200]} is not a call of {FUNCTION}")
    try:
        unnamed = [literals.value(argument) for argument in node.args]
        pairs: list[tuple[str, Any]] = [*zip(("repo_or_dir", "model"), unnamed, strict=False)]
        if unnamed[2:]:
            pairs.append(("args", unnamed[2:]))
        for keyword in node.keywords:
            value = literals.value(keyword.value)
            if keyword.arg is not None:
                pairs.append((keyword.arg, value))
            elif isinstance(value, dict):
                pairs += value.items()
            else:
                raise ValueError("** before a value that is not a dict")
    except ValueError as error:
        raise InvalidTrajectory("placeholder-argument", f"{text[:200]}: {error}") from None
    arguments = dict(pairs)
    if len(arguments) < len(pairs):
        raise InvalidTrajectory("bad-call", f"{text[:200]} names an argument twice")
    for key in ("repo_or_dir", "model"):
        if not isinstance(arguments.get(key), str):
            raise InvalidTrajectory("missing-argument", f"{text[:200]} lacks `{key}`")
    return arguments


def _request(text: str) -> str:
    """Returns the instruction, followed by its input, if any, on a separate line."""
    comma = _INPUT.search(text)
    if not comma:
        return _unquoted(text)
    text_input = _unquoted(text[comma.end() :])
    return _unquoted(text[: comma.start()]) + (f"\n{text_input}" if text_input != "<noinput>" else "")


def _explanation(output: str) -> str:
    match = _EXPLANATION.match(output, max(output.find("'explanation'"), 0))
    return _unquoted(match[1] + match[2] + match[1]) if match else ""


def _unquoted(text: str) -> str:
    """Returns the text without the quotes around it and the backslashes before quotes."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = re.sub(r"\\(['\"])", r"\1", text[1:-1]).strip()
    return text
