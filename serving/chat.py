"""A chat in the terminal with a served model: `python -m serving.chat --base-url http://localhost:8000/v1`.

With tools of a Python file (each public function is one) the model's calls are run; of tools that are only schemas
(JSON) the results are asked for. Reads requests from a pipe as well, one a line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from serving.tools import Tool, load_tools, run_tools
from xlam_jax.cli import Parser, add_server, positive, run
from xlam_jax.client import xLAMChatCompletion, xLAMConfig
from xlam_jax.errors import UserError

HELP = "/tools lists the tools, /reset begins anew, /quit (or Ctrl-D) ends"


class Chat:
    """A conversation and what it needs."""

    def __init__(self, llm: xLAMChatCompletion, tools: list[Tool], system: str | None, max_turns: int):
        self._llm = llm
        self._tools = tools
        self._system = [{"role": "system", "content": system}] if system else []
        self._max_turns = max_turns
        self.messages: list[dict[str, Any]] = list(self._system)

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages = list(self._system)

    def ask(self, text: str) -> None:
        """Asks, shows the answer as it comes, and runs the tools that it calls until it calls none.

        Where that fails the conversation is as before.
        """
        done = run_tools(
            self._llm,
            [*self.messages, {"role": "user", "content": text}],
            self._tools,
            max_turns=self._max_turns,
            told=_show,
            written=lambda piece: print(piece, end="", flush=True),
            missing=lambda name, _: input(f"  result of {name}: "),
        )
        self.messages = done.messages
        if done.ended == "refused":
            print("(the model refused)")
        elif done.ended == "length":
            print("(cut off at --max-tokens, or at the model's limit)")
        elif done.ended == "max_turns":
            print(f"(stopped after {self._max_turns} answers that all called tools, --max-turns)")

    def show_tools(self) -> None:
        """Lists the tools."""
        for tool in self._tools:
            function = tool.schema["function"]
            names = ", ".join((function.get("parameters") or {}).get("properties") or ())
            print(f"  {tool.name}({names})  {(function.get('description') or '').partition(chr(10))[0]}")
        if not self._tools:
            print("  none; --tools FILE gives some")


def _show(message: dict[str, Any]) -> None:
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
        prog="python -m serving.chat", description="Chats with a served model.", epilog=f"In the chat: {HELP}."
    )
    add_server(parser, model="optional")
    parser.add_argument("--tools", type=Path, help="JSON: tool schemas; Python: functions")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--format", choices=("tools", "xlam_v1"), default="tools", help="how the server wants requests")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=positive, metavar="N")
    parser.add_argument(
        "--max-turns", type=positive, default=8, metavar="N", help="answers to a request, with calls between"
    )
    args = parser.parse_args()
    tools = load_tools(args.tools) if args.tools else []
    connection = {"api_key": args.api_key, "timeout": args.timeout}
    model = args.model
    if model is None:
        with xLAMChatCompletion(args.base_url, "", **connection) as asked:
            model = asked.models()[0]
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
    """Reads what is typed until it ends."""
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
            chat.show_tools()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            try:
                chat.ask(text)
            except KeyboardInterrupt:
                print("\n(interrupted; the request is forgotten)")
            except UserError as error:
                if not terminal:  # nobody could ask otherwise
                    raise
                print(f"\nerror: {error}\n(the request is forgotten)")


if __name__ == "__main__":
    run(main)
