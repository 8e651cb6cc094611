"""The other side of the data benchmark: ActionStudio's way from unified trajectories to batches, re-created.

What the public repository does (SalesforceAIResearch/xLAM at a88aa3a, in actionstudio/src:
data_pipeline/data_converters.py, foundation_modeling/data_handlers, foundation_modeling/train/train_sft.py), with its
defaults and those of its published scripts:

1. Beforehand, every assistant turn becomes a row of its own that repeats the whole context. Of a turn with calls only
   the calls are kept, and the system text gets a format instruction. A source's rows are one indented JSON array.
2. Rows stream through `datasets`: the array is read whole, lists become strings by `str`, a shuffle buffer of 500,000
   rows; sources are interleaved with probabilities ∝ size × epochs until all are exhausted, then from the start.
3. 256 rows at a time: `ast.literal_eval`, the chat template, another shuffle; prompt and answer are tokenized apart,
   cut on the left, and skipped when together they are not shorter than the length; else padded to it.
4. torch's DataLoader stacks them, in the main process.

Different here: `datasets` runs no loading scripts any more, so a generator with the same features stands for theirs;
the format instruction is in other words, of like length; the shuffle of 256 rows is seeded.
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

Until the results of the calls are there, give no answer and no interpretation; after that, work with them for the user or go on to call other tools.

Where no call is needed (a question back to the user, general advice or an explanation, small talk, a task that is finished), answer in plain text.
""".strip()  # noqa: E501
SHUFFLE_BUFFER = 500_000
FORMATTED_AT_ONCE = 256
IGNORED = -100
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("messages", "prompt", "chosen", "tools")},
)


class Batch(NamedTuple):
    """What the trainer gets, each int64 [B, T]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


class Sources(NamedTuple):
    """Train-ready data: source → its JSON file, and source → its rows, which is the size in the mixture."""

    files: dict[str, Path]
    rows: dict[str, int]


def prepare(files: dict[str, list[Path]], folder: Path, *, keep_thoughts: bool, prefix: str) -> Sources:
    """Writes the train-ready rows of every source's JSONL files to `folder`/SOURCE/train/train.json.

    `prefix` goes before calls: "[TOOL_CALLS]", or nothing for tokenizers without it. `keep_thoughts`, which they do not
    have, keeps the text beside calls.
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
    for at, message in enumerate(messages):
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
                "id": f"{trajectory['unique_trajectory_id']}---{at}",
                "messages": messages[:at],
                "tools": trajectory.get("tools", []),
                "chosen": chosen,
                "output_message": message,
            }
        )
    return rows


def _generate(path: str) -> Iterator[dict[str, Any]]:
    yield from json.loads(Path(path).read_text(encoding="utf-8"))


class PaddedRows(torch.utils.data.IterableDataset):
    """Endless rows padded to `length`; `skipped` counts those that were too long."""

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
                raise UserError(f"hardly a row has fewer than {self._length} tokens; compare at a greater length")
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
    """The tokenizer as train_sft.py sets it up: no BOS of its own, right padding, cut on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), add_bos_token=False)
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return tokenizer


def batches(rows: PaddedRows, batch_size: int) -> Iterator[Batch]:
    """Endless batches, as the trainer's DataLoader gives them."""
    return iter(torch.utils.data.DataLoader(rows, batch_size, collate_fn=_stack, drop_last=True))


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))
