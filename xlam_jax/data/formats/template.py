"""The `native` format: any tokenizer's own chat template; its structure determines which tokens are trained.

A template may mark what the model generates, with `{% generation %}`. With other templates, the prompt of an assistant
turn is rendered with and without the answer; the difference up to the end token is the answer.

The template also decides which earlier turns keep their reasoning in a prompt. Where it writes an earlier turn
differently in a later prompt, a new sequence starts, so that each turn is trained once, with its reasoning, after the
prompt that a server gives.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from xlam_jax.data.codec import Codec, Kind, Segment, to_json
from xlam_jax.data.control import NO_MARKS
from xlam_jax.data.formats import DROP_REASONING, PLAIN, Layout, Variant, not_representable, without_loss
from xlam_jax.data.formats.detect import detect
from xlam_jax.data.formats.reasoning import KEY, Spelling, find_spelling
from xlam_jax.data.trajectory import InvalidTrajectory, Message, Trajectory, system_text, to_messages, turn_number
from xlam_jax.data.wire import Wire
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
    """A template's answers cannot be separated from their prompts; the message says why."""


class Template:
    """Writes conversations with a jinja template, as transformers and servers do."""

    instructions = 0
    sections = 0
    marks = NO_MARKS

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", codec: Codec):
        self._codec = codec
        self._name = tokenizer.name_or_path
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        # a tokenizer may have different templates for requests with and without tools
        self.template = str(tokenizer.get_chat_template())
        self._with_tools = str(tokenizer.get_chat_template(tools=[{}]))
        self._spellings: dict[str, Spelling | None] = {}

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields one layout if the template never rewrites a turn, else a new one wherever it rewrites earlier turns.

        Raises `UserError` when answers can never be separated from prompts with this template, and `InvalidTrajectory`
        when they cannot in this conversation, or the template refuses it or omits a part of it.
        """
        try:
            yield from self._layouts(trajectory)
        except _UnclearError as unclear:
            if not self._always_unclear:
                hint = "use the format xlam"
                if any(turn.reasoning for turn in trajectory.conversation):
                    hint += f", or {DROP_REASONING}"
                raise not_representable(f"the tokenizer's chat template {unclear}; {hint}") from None
            raise UserError(
                f"the chat template of tokenizer '{self._name}' does not say which tokens the model generates: it "
                f"{unclear}; put {{% generation %}} marks into it, or use the format xlam"
            ) from None

    @property
    def wire(self) -> Wire | None:
        """The wire format that parses what the template writes, None if no row of the table does."""
        return self._detected_wire

    @cached_property
    def _detected_wire(self) -> Wire | None:
        return detect(self.layouts)

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
            marked = chat.after_prompts(text, self._marked(chat, text, marks, turns))
            if marked is not None:
                yield Layout(trajectory, chat.segments(text, marked))
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
        """Returns the prompt for the next assistant turn; it ends with the template's generation prompt."""
        chat = _Chat(self, system, tools, messages)
        chat.check_tools()
        return chat.segments(chat.text(len(messages), prompt=True), [])

    def render(
        self, template: str, messages: list[dict[str, Any]], tools: Any, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns (text, spans of the generated text), as transformers renders messages; the spans only with `marks`.

        With `prompt`, the generation prompt is at the end. Raises `InvalidTrajectory` if the template refuses them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, generated = render_jinja_template(
                conversations=[messages],
                tools=tools or None,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise not_representable(f"the tokenizer's chat template refuses it: {error}; use the format xlam") from None
        return texts[0], [(int(start), int(end)) for start, end in generated[0]] if marks else []

    def spelling(self, template: str) -> Spelling | None:
        """Returns how a template spells reasoning; None if it never writes it."""

        def written(messages: list[dict[str, Any]]) -> str:
            try:
                return self.render(template, messages, [])[0]
            except InvalidTrajectory:
                return ""

        if template not in self._spellings:
            self._spellings[template] = find_spelling(written)
        return self._spellings[template]

    def _marked(
        self, chat: "_Chat", text: str, marks: list[tuple[int, int]], turns: Sequence[Message]
    ) -> list[_Answer]:
        answering = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(marks) == len(answering):
            return [_Answer(turn, *mark) for turn, mark in zip(answering, marks, strict=True)]
        # several marks per turn: each belongs to the last turn that begins before it
        begins = [_common(chat.text(turn), text) for turn in answering]
        answers = [_Answer(answering[max(0, bisect_right(begins, mark[0]) - 1)], *mark) for mark in marks]
        if {answer.turn for answer in answers} != set(answering):
            raise _UnclearError(
                f"has {len(marks)} generation marks in a conversation with {len(answering)} assistant turns"
            )
        return answers

    def _answer(self, chat: "_Chat", turn: int) -> tuple[str, _Answer]:
        prompt, text = chat.text(turn, prompt=True), chat.text(turn + 1)
        if text.startswith(prompt.rstrip()):  # a prompt may end with `<think>\n`, and an empty one be `<think></think>`
            text = prompt + text[len(prompt.rstrip()) :].removeprefix(prompt[len(prompt.rstrip()) :])
        else:
            at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            raise _UnclearError(
                f"writes a prompt for turn {turn} that is not the beginning of the text with the answer: after "
                f"{prompt[max(0, at - 20) : at]!r} the prompt continues with {prompt[at : at + 20]!r}, the text with "
                f"{text[at : at + 20]!r}"
            )
        ends = [match.end() for match in self._codec.special_pattern.finditer(text, len(prompt))]
        if not ends or text[ends[-1] :].strip():
            raise _UnclearError(
                f"ends the answer of turn {turn} with {text[len(prompt) :][-20:]!r}, which is not a control token"
            )
        return text, _Answer(turn, len(prompt), ends[-1])


class _Chat:
    """One conversation, rendered with a template as a whole and in parts."""

    def __init__(self, owner: Template, system: str, tools: list[dict[str, Any]], turns: Sequence[Message]):
        self._owner, self._codec, self._turns = owner, owner._codec, turns
        self.template = owner._with_tools if tools else owner.template
        bare = tuple(turn for turn in turns if turn.role != "system")
        front = 1 if system else 0
        self._offset = front - (len(turns) - len(bare))  # of a message's index from its turn's
        messages = to_messages(Trajectory("", None, None, system, [], bare))
        self._messages, self._tools, self._guard = self._guarded(messages, tools)
        self._reasons = any(turn.reasoning for turn in turns)
        self._spelling = owner.spelling(self.template) if self._reasons else None

    def text(self, turns: int, prompt: bool = False) -> str:
        """Renders the first turns, as many as `turns`; with `prompt`, with the generation prompt at the end."""
        return self._render(self._messages[: turns + self._offset], prompt)[0]

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """Returns (text of all turns, spans of the generated text)."""
        return self._render(self._messages, marks=True)

    def after_prompts(self, text: str, answers: list[_Answer]) -> list[_Answer] | None:
        """Returns the marked answers without what is part of their turns' prompts, such as `<think>`.

        None where the template rewrites the reasoning of earlier turns, so that the text of all turns does not begin
        with these prompts. In a conversation without reasoning, the marks count as they are.
        """
        if not self._reasons:
            return answers
        rest: list[_Answer] = []
        for turn, parts in groupby(answers, key=lambda answer: answer.turn):
            if self._turns[turn].loss is False:
                rest += parts
                continue
            prompt = self.text(turn, prompt=True)
            own = [part._replace(start=max(part.start, len(prompt))) for part in parts if part.end > len(prompt)]
            if not text.startswith(prompt) or not own:
                return None
            if self._turns[turn].reasoning and self._reasoning_end(text, own[0]) == own[0].start:
                return None
            rest += own
        return rest

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
        """The layout of the conversation up to the last answer; turns before the `first` are not trained in it."""
        conversation = without_loss(trajectory.conversation[: answers[-1].turn + 1], before=first)
        return Layout(replace(trajectory, conversation=conversation), self.segments(text, answers))

    def segments(self, text: str, answers: list[_Answer]) -> list[Segment]:
        """Splits the text at its answers and control tokens. Raises `InvalidTrajectory` where content is missing."""
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
                add(self._reasoning_end(text, part), "reasoning", own)
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
        """The span of an answer without its reasoning, its thought and its end token."""
        begin, message = self._reasoning_end(text, answer), self._messages[answer.turn + self._offset]
        written = text[begin : answer.end]
        ends = [match.span() for match in self._codec.special_pattern.finditer(written)]
        stop = ends[-1][0] if ends and not written[ends[-1][1] :].strip() else len(written)
        content = message["content"].strip()
        spoken = written.find(content) + len(content) if message.get("tool_calls") and content in written else 0
        return begin + spoken, begin + stop

    def _reasoning_end(self, text: str, answer: _Answer) -> int:
        """Where the reasoning with its marks ends in an answer; the answer's start if there is none."""
        reasoning = self._messages[answer.turn + self._offset].get(KEY, "").strip()
        if not reasoning or self._spelling is None:
            return answer.start
        return max(answer.start, self._spelling.end(text, reasoning, answer.start, answer.end))

    def _arguments(self, text: str, turn: int, mains: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The spans of the arguments of a turn's calls; empty unless all are in the text as JSON, in order."""
        arguments: list[tuple[int, int]] = []
        position = 0
        for call in self._messages[turn + self._offset].get("tool_calls", []):
            tokens = _JSON_TOKEN.findall(to_json(call["function"]["arguments"]))
            spans = (_find_json(tokens, text, max(start, position), stop) for start, stop in mains)
            span = next((span for span in spans if span), None)
            if span is None:
                return []
            arguments.append(span)
            position = span[1]
        return arguments

    def _add(self, segments: list[Segment], text: str, kind: Kind, turn: int) -> None:
        for at, piece in enumerate(self._codec.special_pattern.split(text)):
            piece = piece.replace(self._guard, "") if self._guard else piece
            if piece:
                segments.append(Segment(piece, kind, turn, control=at % 2 == 1))

    def _check(self, text: str, answers: list[_Answer]) -> None:
        """Raises `InvalidTrajectory` for missing content: templates may silently omit calls or results."""
        squeezed, position = _squeeze(text), 0
        last = answers[-1].turn if answers else len(self._turns)
        for at, message in enumerate(self._messages[: last + self._offset + 1]):
            if message["role"] == "assistant":
                continue
            start = _find(message["content"], squeezed, position)
            position = start if start >= 0 else position
            if start < 0 and _find(message["content"], squeezed, 0) < 0:
                self._missing(f"the text of turn {at - self._offset}, {message['content'][:40]!r}")
        for turn, group in groupby(answers, key=lambda answer: answer.turn):
            message, parts = self._messages[turn + self._offset], list(group)
            written = "".join(text[part.start : part.end] for part in parts)
            if self._turns[turn].loss is False:
                continue
            self._check_reasoning(text, turn, parts)
            if _find(message["content"], _squeeze(written), 0) < 0:
                self._missing(f"the text of turn {turn}, {message['content'][:40]!r}")
            for call in message.get("tool_calls", []):
                if call["function"]["name"] not in written:
                    self._missing(f"the call of '{call['function']['name']}' in turn {turn}")

    def _check_reasoning(self, text: str, turn: int, parts: Sequence[_Answer]) -> None:
        """Raises `InvalidTrajectory` if the reasoning of a trained turn is missing, or would be parsed as another."""
        reasoning = self._turns[turn].reasoning.strip()
        if not reasoning:
            return
        where, hint = f"turn {turn_number(turn, self._turns[turn])}", f"use the format xlam, or {DROP_REASONING}"
        if self._spelling is not None:
            self._spelling.check(reasoning, where, hint)
        if not any(self._reasoning_end(text, part) > part.start for part in parts):
            raise not_representable(f"the tokenizer's chat template omits or changes the reasoning of {where}; {hint}")

    def _missing(self, what: str) -> NoReturn:
        raise not_representable(f"the tokenizer's chat template omits or changes {what}; use the format xlam")

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool = False, marks: bool = False, tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        if self._reasons:
            messages = [self._spelling.spell(message) if self._spelling else _bare(message) for message in messages]
        return self._owner.render(self.template, messages, self._tools if tools else [], prompt, marks)

    def _guarded(self, messages: Any, tools: Any) -> tuple[Any, Any, str]:
        """Inserts a character, which occurs nowhere in the content, into the control tokens that the content spells."""
        content = "\0".join(_strings([messages, tools]))
        pattern = self._codec.special_pattern
        if not pattern.search(content):
            return messages, tools, ""
        guard = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in content)

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: match[0][:1] + guard + match[0][1:], value)
            if isinstance(value, dict):
                return {broken(key): broken(item) for key, item in value.items()}
            return [broken(item) for item in value] if isinstance(value, list) else value

        return broken(messages), broken(tools), guard


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != KEY}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _common(first: str, second: str) -> int:
    """The length of the longest common prefix of two texts."""
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
    """Where a text, or its JSON form, begins in `squeezed`, which has no white space; -1 if it does not occur."""
    start = squeezed.find(_squeeze(content), position)
    return start if start >= 0 else squeezed.find(_squeeze(to_json(content)[1:-1]), position)


def _find_json(tokens: Sequence[str], text: str, start: int, stop: int) -> tuple[int, int] | None:
    """The span of a JSON value's tokens, with any white space between them, and of the space in front of it."""
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
