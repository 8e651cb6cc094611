"""The other side of the data benchmark: a re-creation of ActionStudio's pipeline from unified trajectories to batches.

The public repository (SalesforceAIResearch/xLAM at a88aa3a, in actionstudio/src: data_pipeline/data_converters.py,
foundation_modeling/data_handlers, foundation_modeling/train/train_sft.py) works as follows, with its defaults and those
of its published scripts:

1. Preparation turns every assistant turn into a separate row that repeats the whole context. Of a turn with calls, only
   the calls are kept, and the system text gets a format instruction. The rows of a source are one indented JSON array.
2. Rows stream through `datasets`: the array is read as a whole, lists become strings by `str`, and a buffer of 500,000
   rows is shuffled. Sources are interleaved with probabilities ∝ size × epochs until all are exhausted, then restarted.
3. For 256 rows at a time: `ast.literal_eval`, the chat template, another shuffle. Prompt and answer are tokenized
   separately and truncated on the left. A row that is not shorter than the length is skipped, others are padded to it.
4. torch's DataLoader stacks the rows in the main process.

Differences here: `datasets` no longer runs loading scripts, so a generator with the same features replaces theirs; the
format instruction is worded differently, with a similar length; the shuffle of 256 rows is seeded.
"""

import ast
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import torch
import transformers

from xlam_jax.errors import UserError

FORMAT_INSTRUCTION = """
As an assistant with access to tools you may call one or several of them. Write all calls of a turn as one JSON list after
[TOOL_CALLS], with an object for each call; write neither several lists nor separate objects. This is the structure:

```
[TOOL_CALLS][{"name": "name_of_the_tool", "arguments": {"argument1": "value1", "argument2": "value2"}}, ... (more calls that run in parallel, where they are needed)]
```

Until the results of the calls are there, give no answer and no interpretation; after that, work with them for the user or continue with calls of other tools.

Where no call is needed (a question back to the user, general advice or an explanation, small talk, a task that is finished), answer in plain text.
""".strip()  # noqa: E501
SHUFFLE_BUFFER = 500_000
FORMATTED_AT_ONCE = 256
IGNORED = -100
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("messages", "prompt", "chosen", "tools")},
)


class Batch(NamedTuple):
    """A batch of the trainer, each int64 [B, T]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


class Sources(NamedTuple):
    """Prepared data: source → JSON file, and source → number of rows, which is its size in the mixture."""

    files: dict[str, Path]
    rows: dict[str, int]


def prepare(files: dict[str, list[Path]], folder: Path, *, keep_thoughts: bool, prefix: str) -> Sources:
    """Writes the rows of every source's JSONL files to `folder`/SOURCE/train/train.json.

    `prefix`: text before calls, "[TOOL_CALLS]", or nothing for tokenizers without it. `keep_thoughts`: keep the text
    next to calls, which ActionStudio does not do.
    """
    written, sizes = {}, {}
    for name, paths in files.items():
        rows = []
        for path in paths:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    rows += _rows(json.loads(line), keep_thoughts, prefix)
        written[name], sizes[name] = folder / name / "train" / "train.json", len(rows)
        written[name].parent.mkdir(parents=True, exist_ok=True)
        with written[name].open("w", encoding="utf-8") as out:
            json.dump(rows, out, indent=4)
    return Sources(written, sizes)


def _rows(trajectory: dict[str, Any], keep_thoughts: bool, prefix: str) -> list[dict[str, Any]]:
    system = f"{trajectory.get('task_instruction', '')}\n{FORMAT_INSTRUCTION}"
    messages = [{"role": "system", "content": system}, *trajectory["conversation"]]
    rows = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = message.get("content") or ""
        if calls := message.get("tool_calls"):
            chosen = (text if keep_thoughts else "") + prefix + json.dumps([call["function"] for call in calls])
        elif text.strip().lower() in ("", "none", "null"):
            continue
        else:
            chosen = text
        rows.append(
            {
                "id": f"{trajectory['unique_trajectory_id']}---{turn}",
                "messages": messages[:turn],
                "tools": trajectory.get("tools", []),
                "chosen": chosen,
                "output_message": message,
            }
        )
    return rows


def _generate(path: str) -> Iterator[dict[str, Any]]:
    yield from json.loads(Path(path).read_text(encoding="utf-8"))


class PaddedRows(torch.utils.data.IterableDataset):
    """An infinite stream of rows padded to `length`; `skipped` counts rows that were too long."""

    def __init__(
        self, sources: Sources, tokenizer: transformers.PreTrainedTokenizerBase, length: int, seed: int
    ) -> None:
        # epochs are 1 for every source, so a source's probability is its share of the rows
        streams = [
            datasets.IterableDataset.from_generator(
                _generate, features=FEATURES, gen_kwargs={"path": str(path)}
            ).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            for path in sources.files.values()
        ]
        total = sum(sources.rows.values())
        self._rows = datasets.interleave_datasets(
            [stream.shuffle(seed, buffer_size=SHUFFLE_BUFFER) for stream in streams],
            probabilities=[size / total for size in sources.rows.values()],
            seed=seed,
            stopping_strategy="all_exhausted",
        )
        self._tokenizer, self._length = tokenizer, length
        self._pad_id = cast(int, tokenizer.pad_token_id or 0)
        self._random = random.Random(seed)
        self.skipped = 0

    def __iter__(self) -> Iterator[Batch]:
        rows = self._endless()
        while True:
            formatted = [self._format(row) for row in islice(rows, FORMATTED_AT_ONCE)]
            self._random.shuffle(formatted)
            padded = [row for prompt, answer in formatted if (row := self._pad(prompt, answer))]
            self.skipped += len(formatted) - len(padded)
            if self.skipped > FORMATTED_AT_ONCE * 40 and not padded:
                raise UserError(f"almost no row has fewer than {self._length} tokens; use a greater length")
            yield from padded

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self._rows

    def _format(self, row: dict[str, Any]) -> tuple[str, str]:
        messages, tools = ast.literal_eval(row["messages"]), ast.literal_eval(row["tools"])
        prompt = self._tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=False
        )
        assert isinstance(prompt, str)
        eos = str(self._tokenizer.eos_token)
        return prompt, row["chosen"] if row["chosen"].endswith(eos) else row["chosen"] + eos

    def _pad(self, prompt: str, answer: str) -> Batch | None:
        prompt_ids, answer_ids = self._encode(prompt), self._encode(answer)
        used = len(prompt_ids) + len(answer_ids)
        if used >= self._length:
            return None
        blank = self._length - used
        return Batch(
            _concatenated(prompt_ids, answer_ids, [self._pad_id] * blank),
            _concatenated([IGNORED] * len(prompt_ids), answer_ids, [IGNORED] * blank),
            torch.LongTensor([1] * used + [0] * blank),
        )

    def _encode(self, text: str) -> list[int]:
        return cast(list[int], self._tokenizer(text, truncation=True, max_length=self._length)["input_ids"])


def _concatenated(*parts: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.LongTensor(part) for part in parts])


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer as train_sft.py: no BOS token, padding on the right, truncation on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), add_bos_token=False)
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return tokenizer


def batches(rows: PaddedRows, batch_size: int) -> Iterator[Batch]:
    """Returns an infinite iterator of batches from the trainer's DataLoader."""
    return iter(torch.utils.data.DataLoader(rows, batch_size, collate_fn=_stack, drop_last=True))


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))
