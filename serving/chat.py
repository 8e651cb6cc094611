"""Terminal chat with a served model: `python -m serving.chat --base-url http://localhost:8000/v1`.

Tools from a Python file (each public function is a tool) are run when the model calls them. For tools from a JSON file
of schemas, the user types the results. Requests may also come from a pipe, one per line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from serving.tools import Tool, load_tools, run_tools
from xlam_jax.cli import Parser, add_server, positive, run
from xlam_jax.client import xLAMChatCompletion, xLAMConfig
from xlam_jax.errors import UserError

HELP = "/tools lists the tools, /reset starts a new conversation, /quit (or Ctrl-D) ends"


class Chat:
    """A conversation with a served model and its tools."""

    def __init__(self, llm: xLAMChatCompletion, tools: list[Tool], system: str | None, max_turns: int):
        self._llm = llm
        self._tools = tools
        self._system = [{"role": "system", "content": system}] if system else []
        self._max_turns = max_turns
        self.messages: list[dict[str, Any]] = list(self._system)

    def reset(self) -> None:
        """Discards the conversation except for the system message."""
        self.messages = list(self._system)

    def ask(self, text: str) -> None:
        """Sends a request, prints the answer as it streams, and runs tools until the model calls none.

        If an error is raised, the conversation is unchanged.
        """
        result = run_tools(
            self._llm,
            [*self.messages, {"role": "user", "content": text}],
            self._tools,
            max_turns=self._max_turns,
            on_message=_print_message,
            on_text=lambda piece: print(piece, end="", flush=True),
            missing_result=lambda name, _: input(f"  result of {name}: "),
        )
        self.messages = result.messages
        if result.ended == "refused":
            print("(the model refused)")
        elif result.ended == "length":
            print("(cut off at --max-tokens, or at the model's context length)")
        elif result.ended == "max_turns":
            print(f"(stopped after {self._max_turns} answers that all called tools, --max-turns)")

    def print_tools(self) -> None:
        """Prints the tools with their parameters and descriptions."""
        for tool in self._tools:
            function = tool.schema["function"]
            names = ", ".join((function.get("parameters") or {}).get("properties") or ())
            print(f"  {tool.name}({names})  {(function.get('description') or '').partition(chr(10))[0]}")
        if not self._tools:
            print("  none; add tools with --tools FILE")


def _print_message(message: dict[str, Any]) -> None:
    if message["role"] == "tool":
        print(f"← {message['content']}")
        return
    if message["content"]:
        print()
    for call in message.get("tool_calls", ()):
        print(f"→ {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m serving.chat", description="Chat with a served model.", epilog=f"In the chat: {HELP}."
    )
    add_server(parser, model="optional")
    parser.add_argument("--tools", type=Path, help="JSON file of tool schemas, or Python file of functions")
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--format",
        choices=("tools", "xlam_v1"),
        default="tools",
        help="request format: messages and tools, or xLAM v1's single message (default: tools)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature (default: 0)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="maximum number of tokens of an answer")
    parser.add_argument(
        "--max-turns",
        type=positive,
        default=8,
        metavar="N",
        help="maximum number of answers to one request, with tool calls in between (default: 8)",
    )
    args = parser.parse_args()
    tools = load_tools(args.tools) if args.tools else []
    connection = {"api_key": args.api_key, "timeout": args.timeout}
    model = args.model
    if model is None:
        with xLAMChatCompletion(args.base_url, "", **connection) as client:
            model = client.models()[0]
    llm = xLAMChatCompletion.from_config(
        xLAMConfig(
            base_url=args.base_url,
            model=model,
            format=args.format,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            **connection,
        )
    )
    with llm:
        talk(Chat(llm, tools, args.system, args.max_turns), f"{model}, {len(tools)} tools. {HELP}.")


def talk(chat: Chat, greeting: str) -> None:
    """Reads requests and commands from stdin until it ends or the user quits."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(greeting)
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
        elif text == "/tools":
            chat.print_tools()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            try:
                chat.ask(text)
            except KeyboardInterrupt:
                print("\n(interrupted; the request is discarded)")
            except UserError as error:
                if not terminal:  # nobody could retry
                    raise
                print(f"\nerror: {error}\n(the request is discarded)")


if __name__ == "__main__":
    run(main)
