"""Spellings of tools in system texts and of calls in assistant texts, and rows that contain them."""

import json
from typing import Any

from conversions import items
from hypothesis import settings

from xlam_jax.data.converters.common import Converted
from xlam_jax.data.trajectory import Trajectory

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def function(name: str, *properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in properties}}
    return {"name": name, "description": f"Does {name}: 'quoted', true.", "parameters": schema}


TIDE, PORT = function("get_tide", "harbour"), function("find_port", "country")
TOOLS = [{"type": "function", "function": each} for each in (TIDE, PORT)]
TIDE_CALL = {"name": "get_tide", "arguments": {"harbour": "Bergen"}}
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    "Here are the available tools:{} Use the following pydantic model json schema for each tool call you will make: "
    '{{"properties": {{"arguments": {{"title": "Arguments", "type": "object"}}, "name": {{"title": "Name", "type": '
    '"string"}}}}, "required": ["arguments", "name"], "title": "FunctionCall", "type": "object"}} For each function '
    "call return a json object within <tool_call></tool_call> XML tags as follows:\n"
    '<tool_call>\n{{"arguments": <args-dict>, "name": <function-name>}}\n</tool_call>'
)
LINES = "\n".join(map(json.dumps, TOOLS))
DECLARATIONS = {  # name → (system text with {}, replacement for {})
    "hermes": (HERMES, f"<tools> {json.dumps(TOOLS)} </tools>"),
    "qwen": (
        "Be kind.\n\n# Tools\n\nSignatures are within <tools></tools> tags:\n{}\n\nCall.",
        f"<tools>\n{LINES}\n</tools>",
    ),
    "after a mention": (
        "Signatures are within <tools> and </tools>, or in <tools>:\n{}",
        f"<tools>\n{LINES}\n</tools>",
    ),
    "one line": ("{}", f"<tools>{json.dumps(TOOLS[0])} {json.dumps(TOOLS[1])}</tools>"),
    "pretty": ("Tools: {}", "<tools>\n" + ",\n".join(json.dumps(each, indent=2) for each in TOOLS) + "\n</tools>"),
    "fenced": ("Tools: {}", f"<tools>\n```json\n{json.dumps(TOOLS)}\n```\n</tools>"),
    "python list": ("Tools: {}", f"<tools>{TOOLS!r}</tools>"),
    "python lines": ("Tools: {}", f"<tools>\n{TOOLS[0]!r}\n{TOOLS[1]!r}\n</tools>"),
    "flat": ("Tools: {} Go.", f"<tools>{json.dumps([TIDE, PORT])}</tools>"),
    "mistral": ("{}", f"[AVAILABLE_TOOLS]{json.dumps(TOOLS)}[/AVAILABLE_TOOLS]"),
    "toolace": (
        "You are an expert in composing functions. Put calls as [func(a=b)].\n"
        "Here is a list of functions in JSON format that you can invoke:\n{}. \nReturn nothing else.",
        json.dumps([{**TIDE, "required": None}, {**PORT, "required": None}]),
    ),
    "glaive": (
        "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{}\n",
        json.dumps(TIDE, indent=4) + "\n\n" + json.dumps(PORT, indent=4),
    ),
    "llama": (
        "Given the following functions, please respond with JSON.\n\n{}\n\nNo variables.",
        json.dumps(TOOLS, indent=4),
    ),
    "llama with the form of calls": (
        'Given the following functions, respond in the format {{"name": function name, "parameters": dictionary of '
        "argument name and its value}}.\n\n{}",
        json.dumps(TOOLS, indent=4),
    ),
    "anthropic": (
        "Tools:\n{}",
        json.dumps(
            [
                {"name": e["name"], "description": e["description"], "input_schema": e["parameters"]}
                for e in (TIDE, PORT)
            ]
        ),
    ),
}
CALLS = {  # each names get_tide(harbour="Bergen")
    "hermes": f"<tool_call>\n{json.dumps(TIDE_CALL)}\n</tool_call>",
    "hermes python": f"<tool_call>\n{TIDE_CALL!r}\n</tool_call>",
    "hermes cut": f"<tool_call>\n{json.dumps(TIDE_CALL)}\n",
    "list": json.dumps([TIDE_CALL]),
    "pretty list": json.dumps([TIDE_CALL], indent=2) + "\n",
    "object": json.dumps(TIDE_CALL),
    "python": repr([TIDE_CALL]),
    "fenced": f"```json\n{json.dumps([TIDE_CALL])}\n```",
    "mistral": f"[TOOL_CALLS][{json.dumps(TIDE_CALL)}]",
    "mistral v11": '[TOOL_CALLS]get_tide[ARGS]{"harbour": "Bergen"}',
    "glaive": """<functioncall> {"name": "get_tide", "arguments": '{"harbour": "Bergen"}'} <|endoftext|>""",
    "llama": '{"name": "get_tide", "parameters": {"harbour": "Bergen"}}',
    "llama tag": '<|python_tag|>{"name": "get_tide", "parameters": {"harbour": "Bergen"}}<|eom_id|>',
    "llama function": '<function=get_tide>{"harbour": "Bergen"}</function>',
    "python tag": '<|python_tag|>get_tide.call(harbour="Bergen")',
    "toolace": '[get_tide(harbour="Bergen")]',
    "bare": 'get_tide(harbour="Bergen")',
    "bare fenced": "```tool_code\nget_tide(harbour='Bergen')\n```",
    "openai": json.dumps([{"type": "function", "function": {**TIDE_CALL, "arguments": '{"harbour": "Bergen"}'}}]),
    "openai turn": json.dumps({"tool_calls": [{"type": "function", "function": TIDE_CALL}]}),
    "react": 'Action: get_tide\nAction Input: {"harbour": "Bergen"}',
}
UNREADABLE = {
    "cut": '<tool_call>\n{"name": "get_tide", "arguments": {"harbour": "Ber',
    "no JSON": "<tool_call>\nget_tide Bergen\n</tool_call>",
    "undeclared": '<tool_call>{"name": "get_tides", "arguments": {}}</tool_call>',
    "undeclared list": '[{"name": "get_tides", "arguments": {}}]',
    "undeclared python": "[get_tides(harbour='Bergen')]",
    "list cut": 'I look.\n[{"name": "get_tide", "arguments": {"harbour": "Bergen"}',
    "code": 'calls = [{"name": "get_tide", "arguments": {}}]',
    "text after": '[{"name": "get_tide", "arguments": {}}] That is the call.',
    "list arguments": '[{"name": "get_tide", "arguments": ["Bergen"]}]',
    "a variable": "[get_tide(harbour=town)]",
    "by position": '[get_tide("Bergen", harbour="Bergen")]',
    "twice": '[get_tide(harbour="Bergen", harbour="Oslo")]',
    "evaluated": '[get_tide(harbour=open("x").read())]',
    "unread mark": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_tide",
    "qwen-agent": '✿FUNCTION✿: get_tide\n✿ARGS✿: {"harbour": "Bergen"}',
    "with its result": CALLS["hermes"] + "\n<tool_response>\n{}\n</tool_response>\nIt is high.",
}


def read(format: str, row: dict[str, Any]) -> tuple[Trajectory, list[str]]:
    """Converts a row that gives one trajectory; returns it and the reasons of its repairs."""
    (item,) = items(format, row)
    assert isinstance(item, Converted), item
    return item.trajectory, [repair.reason for repair in item.repairs]


def row_with(text: str, tools: list[dict[str, Any]] = TOOLS) -> dict[str, Any]:
    """Returns a unified row with this assistant text."""
    turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": text}]
    return {"unique_trajectory_id": "t", "tools": tools, "conversation": turns}
