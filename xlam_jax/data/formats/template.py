"""Any tokenizer's own chat template, with the loss mask found by its structure, never by searching for its text.

A template that marks what the model generates (`{% generation %}`) says it itself. For others, the prompt of an
assistant turn is rendered, and the same with the answer; what the second has more is the answer, up to its end token.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from xlam_jax.data.codec import Codec, Kind, Segment, to_json
from xlam_jax.data.formats import PLAIN, Layout, Variant, not_representable, without_loss
from xlam_jax.data.trajectory import InvalidTrajectory, Message, Trajectory, system_text, to_messages
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]|[^][{}:,"\s]+')


class _Answer(NamedTuple):
    turn: int
    start: int
    end: int


class _UnclearError(Exception):
    """What a template does so that its answers cannot be told apart."""


class Template:
    """Renders with jinja, as transformers and servers do."""

    instructions = 0
    sections = 0

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", codec: Codec):
        self._codec = codec
        self._name = tokenizer.name_or_path
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        # a tokenizer may bring one template for requests with tools and one for those without
        self.template = str(tokenizer.get_chat_template())
        self._with_tools = str(tokenizer.get_chat_template(tools=[{}]))

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Gives one layout if the template writes every turn once and for all, else one up to each turn it rewrites.

        Raises `UserError` when the template never lets answers be told apart, and `InvalidTrajectory` when it does not
        in this conversation, refuses it, or leaves out a part of it.
        """
        try:
            yield from self._layouts(trajectory)
        except _UnclearError as unclear:
            if not self._always_unclear:
                raise not_representable(f"the tokenizer's chat template {unclear}; use the format xlam") from None
            raise UserError(
                f"the chat template of tokenizer '{self._name}' does not say which tokens the model generates: it "
                f"{unclear}; put {{% generation %}} marks into it, or use the format xlam"
            ) from None

    @cached_property
    def _always_unclear(self) -> bool:
        turns = (Message("user", "a"), Message("assistant", "b"))
        try:
            list(self._layouts(Trajectory("", None, None, "", [], turns)))
        except _UnclearError:
            return True
        except InvalidTrajectory:
            return False
        return False

    def _layouts(self, trajectory: Trajectory) -> Iterator[Layout]:
        turns = trajectory.conversation
        system = system_text(trajectory.task_instruction, turns)
        chat = _Chat(self, system, trajectory.tools, turns)
        chat.check_tools()
        if _GENERATION.search(chat.template):
            text, marks = chat.marked()
            yield Layout(trajectory, chat.segments(text, self._marked(chat, text, marks, turns)))
            return
        trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss is not False]
        text, answers, first = "", list[_Answer](), 0
        for turn in trained:
            longer, answer = self._answer(chat, turn)
            if answers and not longer.startswith(text[: answers[-1].end]):
                yield chat.layout(trajectory, text, answers, first)
                first, answers = answers[-1].turn + 1, []
            text = longer
            answers.append(answer)
        if answers:
            yield chat.layout(trajectory, text, answers, first)

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Ends with what the template calls the generation prompt."""
        chat = _Chat(self, system, tools, messages)
        chat.check_tools()
        return chat.segments(chat.text(len(messages), prompt=True), [])

    def _marked(
        self, chat: "_Chat", text: str, marks: list[tuple[int, int]], turns: Sequence[Message]
    ) -> list[_Answer]:
        answering = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(marks) == len(answering):
            return [_Answer(turn, *mark) for turn, mark in zip(answering, marks, strict=True)]
        # several marks a turn: each belongs to the last turn that begins before it
        begins = [_common(chat.text(turn), text) for turn in answering]
        answers = [_Answer(answering[max(0, bisect_right(begins, mark[0]) - 1)], *mark) for mark in marks]
        if {answer.turn for answer in answers} != set(answering):
            raise _UnclearError(
                f"has {len(marks)} generation marks in a conversation with {len(answering)} assistant turns"
            )
        return answers

    def _answer(self, chat: "_Chat", turn: int) -> tuple[str, _Answer]:
        prompt, text = chat.text(turn, prompt=True), chat.text(turn + 1)
        if not text.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            raise _UnclearError(
                f"writes a prompt for turn {turn} that is no beginning of what it writes with the answer: after "
                f"{prompt[max(0, at - 20) : at]!r} the prompt goes on with {prompt[at : at + 20]!r}, the other with "
                f"{text[at : at + 20]!r}"
            )
        ends = [found.end() for found in self._codec.special_pattern.finditer(text, len(prompt))]
        if not ends or text[ends[-1] :].strip():
            raise _UnclearError(
                f"ends the answer of turn {turn} with {text[len(prompt) :][-20:]!r}, which is no control token"
            )
        return text, _Answer(turn, len(prompt), ends[-1])


class _Chat:
    """One conversation in the hands of a template."""

    def __init__(self, owner: Template, system: str, tools: list[dict[str, Any]], turns: Sequence[Message]):
        self._codec, self._variables, self._turns = owner._codec, owner._variables, turns
        self.template = owner._with_tools if tools else owner.template
        bare = tuple(turn for turn in turns if turn.role != "system")
        front = 1 if system else 0
        self._offset = front - (len(turns) - len(bare))  # of a message's index from its turn's
        messages = to_messages(Trajectory("", None, None, system, [], bare))
        self._messages, self._tools, self._guard = self._guarded(messages, tools)

    def text(self, turns: int, prompt: bool = False) -> str:
        """The text of the first so many turns; with `prompt`, up to where the assistant answers."""
        return self._render(self._messages[: turns + self._offset], prompt)[0]

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and from where to where it is generated."""
        return self._render(self._messages, marks=True)

    def check_tools(self) -> None:
        """Raises `InvalidTrajectory` when a tool is not in the prompt of the first answer."""
        if not self._tools:
            return
        answers = (at for at, message in enumerate(self._messages) if message["role"] == "assistant")
        first = self._messages[: next(answers, None)]
        (text, _), (bare, _) = (self._render(first, prompt=True, tools=tools) for tools in (True, False))
        for tool in self._tools:
            name = tool["function"]["name"]
            if text.count(name) <= bare.count(name):
                self._missing(f"the tool '{name}'")

    def layout(self, trajectory: Trajectory, text: str, answers: list[_Answer], first: int) -> Layout:
        """The conversation up to the last answer, in which turns before the `first` carry no loss."""
        conversation = without_loss(trajectory.conversation[: answers[-1].turn + 1], before=first)
        return Layout(replace(trajectory, conversation=conversation), self.segments(text, answers))

    def segments(self, text: str, answers: list[_Answer]) -> list[Segment]:
        """Cuts the text at its answers and control tokens. Raises `InvalidTrajectory` where something is missing."""
        self._check(text, answers)
        segments: list[Segment] = []
        position, turn = 0, -1

        def add(end: int, kind: Kind, turn: int) -> None:
            nonlocal position
            self._add(segments, text[position:end], kind, turn)
            position = end

        for own, parts in groupby(answers, key=lambda answer: answer.turn):
            mains = [(part, self._main(text, part)) for part in parts]
            arguments = self._arguments(text, own, [main for _, main in mains])
            for part, (start, stop) in mains:
                add(part.start, "prompt", turn)
                add(start, "thought", own)
                for first, last in arguments:
                    if start <= first and last <= stop:
                        add(first, "tool_call", own)
                        add(last, "arguments", own)
                add(stop, "tool_call" if self._turns[own].tool_calls else "answer", own)
                add(part.end, "eos", own)
                turn = own + 1
        add(len(text), "prompt", min(turn, len(self._turns) - 1))
        return segments

    def _main(self, text: str, answer: _Answer) -> tuple[int, int]:
        """From where to where an answer is neither thought nor end."""
        written, message = text[answer.start : answer.end], self._messages[answer.turn + self._offset]
        ends = [(found.start(), found.end()) for found in self._codec.special_pattern.finditer(written)]
        stop = ends[-1][0] if ends and not written[ends[-1][1] :].strip() else len(written)
        content = message["content"].strip()
        spoken = written.find(content) + len(content) if message.get("tool_calls") and content in written else 0
        return answer.start + spoken, answer.start + stop

    def _arguments(self, text: str, turn: int, mains: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """From where to where the arguments of a turn's calls stand; nothing unless all are there as JSON, in order."""
        found: list[tuple[int, int]] = []
        position = 0
        for call in self._messages[turn + self._offset].get("tool_calls", []):
            tokens = _JSON_TOKEN.findall(to_json(call["function"]["arguments"]))
            spans = (_find_json(tokens, text, max(start, position), stop) for start, stop in mains)
            span = next((one for one in spans if one), None)
            if span is None:
                return []
            found.append(span)
            position = span[1]
        return found

    def _add(self, segments: list[Segment], text: str, kind: Kind, turn: int) -> None:
        for at, piece in enumerate(self._codec.special_pattern.split(text)):
            piece = piece.replace(self._guard, "") if self._guard else piece
            if piece:
                segments.append(Segment(piece, kind, turn, control=at % 2 == 1))

    def _check(self, text: str, answers: list[_Answer]) -> None:
        """The whole content must be there: a template that knows no calls or results leaves them out silently."""
        squeezed, position = _squeeze(text), 0
        last = answers[-1].turn if answers else len(self._turns)
        for at, message in enumerate(self._messages[: last + self._offset + 1]):
            if message["role"] == "assistant":
                continue
            found = _find(message["content"], squeezed, position)
            position = found if found >= 0 else position
            if found < 0 and _find(message["content"], squeezed, 0) < 0:
                self._missing(f"the text of turn {at - self._offset}, {message['content'][:40]!r}")
        for turn, parts in groupby(answers, key=lambda answer: answer.turn):
            message = self._messages[turn + self._offset]
            written = "".join(text[part.start : part.end] for part in parts)
            if self._turns[turn].loss is False:
                continue
            if _find(message["content"], _squeeze(written), 0) < 0:
                self._missing(f"the text of turn {turn}, {message['content'][:40]!r}")
            for call in message.get("tool_calls", []):
                if call["function"]["name"] not in written:
                    self._missing(f"the call of '{call['function']['name']}' in turn {turn}")

    def _missing(self, what: str) -> NoReturn:
        raise not_representable(f"the tokenizer's chat template leaves out or changes {what}; use the format xlam")

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool = False, marks: bool = False, tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=(self._tools or None) if tools else None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise not_representable(f"the tokenizer's chat template refuses it: {error}; use the format xlam") from None
        return texts[0], [(int(start), int(end)) for start, end in found[0]] if marks else []

    def _guarded(self, messages: Any, tools: Any) -> tuple[Any, Any, str]:
        """Breaks up the control tokens that the content spells out, with a character that occurs nowhere in it."""
        content = "\0".join(_strings([messages, tools]))
        pattern = self._codec.special_pattern
        if not pattern.search(content):
            return messages, tools, ""
        guard = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in content)

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda found: found[0][:1] + guard + found[0][1:], value)
            if isinstance(value, dict):
                return {broken(key): broken(item) for key, item in value.items()}
            return [broken(item) for item in value] if isinstance(value, list) else value

        return broken(messages), broken(tools), guard


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _common(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    same, limit = 0, min(len(first), len(second))
    while same < limit:
        half = (same + limit + 1) // 2
        if first[same:half] == second[same:half]:
            same = half
        else:
            limit = half - 1
    return same


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _find(content: str, squeezed: str, position: int) -> int:
    """Where a text begins, whatever the white space, as it is or as JSON writes it; -1 if it does not."""
    found = squeezed.find(_squeeze(content), position)
    return found if found >= 0 else squeezed.find(_squeeze(to_json(content)[1:-1]), position)


def _find_json(tokens: Sequence[str], text: str, start: int, stop: int) -> tuple[int, int] | None:
    """Where the tokens of a JSON value stand, whatever the white space between them, and the space in front of it."""
    begin = text.find(tokens[0], start, stop)
    while begin >= 0:
        at = begin
        for token in tokens:
            while text[at : at + 1].isspace():
                at += 1
            if not text.startswith(token, at, stop):
                break
            at += len(token)
        else:
            return begin - (begin > start and text[begin - 1] == " "), at
        begin = text.find(tokens[0], begin + 1, stop)
    return None
