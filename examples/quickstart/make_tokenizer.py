"""Trains the quickstart's tokenizer on its trajectories: `python make_tokenizer.py`.

It is a byte-level BPE of 2048 entries with Mistral's control tokens and the `xlam` chat template. The same data give
the same bytes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from xlam_jax.cli import run
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import CONTROL_TOKENS
from xlam_jax.data.tokenizer import save
from xlam_jax.data.trajectory import InvalidTrajectory, system_text
from xlam_jax.errors import UserError

SOURCES = ("hammer", "hotpotqa", "seal_tools", "webshop")
SPECIAL = ("<unk>", "<s>", "</s>", *CONTROL_TOKENS, "<pad>")
SIZE = 2048


def main(arguments: list[str] | None = None) -> None:
    """Trains the tokenizer and writes it as a Hugging Face folder."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=here / "tokenizer", help="output folder (default: tokenizer/)")
    options = parser.parse_args(arguments)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(here), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(CONTROL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) != SIZE:
        raise UserError(f"the data give {len(tokenizer)} entries, not {SIZE}; use more trajectories")
    save(tokenizer, options.out)
    print(f"{options.out}: {len(tokenizer)} entries")


def texts(folder: Path) -> Iterator[str]:
    """Yields the text of the rendered trajectories, without control tokens."""
    for source in SOURCES:
        for number, trajectory in read_jsonl(folder / f"{source}.jsonl"):
            if isinstance(trajectory, InvalidTrajectory):
                raise UserError(f"{folder / source}.jsonl:{number}: {trajectory}; recreate it with make_data.py")
            yield json.dumps(trajectory.tools, ensure_ascii=False)
            yield system_text(trajectory.task_instruction, trajectory.conversation)
            for turn in trajectory.conversation:
                yield turn.content
                calls = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
                if calls:
                    yield json.dumps(calls, ensure_ascii=False)


if __name__ == "__main__":
    run(main)
