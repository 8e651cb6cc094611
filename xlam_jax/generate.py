"""Asks a model from the command line: `python -m xlam_jax.generate --model DIR --messages FILE.json`.

Prints one JSON object a conversation: `{"content", "tool_calls", "finish_reason"}`. The prompt is rendered, and the
completion parsed, by the same code that renders the training data.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.cli import Parser, number, run
from xlam_jax.documents import read_json
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xlam_jax.models.config import ModelConfig
    from xlam_jax.models.decoder import Decoder
    from xlam_jax.models.params import Params


class Found(NamedTuple):
    """What a model folder holds; its weights are read last, so that a mistake in the request is told at once."""

    config: "ModelConfig"
    tokenizer: "PreTrainedTokenizerFast"
    load: "Callable[[], Decoder]"
    stops: list[int]
    """Tokens that end an answer: those that ended trained turns, and those of the source's generation config."""


def find_model(folder: Path) -> Found:
    """Opens a Hugging Face folder, a run folder (its newest step) or a step folder.

    Matrices are held, and products computed, in the dtype that the model's config names; norms and routers keep theirs.
    """
    from xlam_jax.data.render import end_tokens
    from xlam_jax.data.tokenizer import load_tokenizer
    from xlam_jax.models.config import ModelConfig, read_hf_config
    from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config, stop_ids
    from xlam_jax.weights import checkpoint
    from xlam_jax.weights import run as weights
    from xlam_jax.weights.hf import load_hf

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder, a run folder or one of its steps")
    if checkpoint.is_checkpoint(folder):
        step = checkpoint.resolve(folder)
        hf_config, tokenizer = checkpoint.load_hf_config(step), checkpoint.tokenizer_dir(step)
        if tokenizer is None:
            raise UserError(
                f"{folder}: the checkpoint has no tokenizer beside it; put one into {checkpoint.TOKENIZER}/"
            )
        read = partial(weights.load_whole, step)
        generation = checkpoint.load_generation_config(step)
    elif (folder / "config.json").is_file():
        hf_config, tokenizer = read_hf_config(folder / "config.json"), folder
        generation = read_generation_config(folder / GENERATION_CONFIG)

        def read() -> "Params":
            return load_hf(folder)[1]

    else:
        raise UserError(
            f"{folder}: neither a Hugging Face folder (config.json is missing) nor a checkpoint (checkpoints/STEP is "
            "missing); give one of the two"
        )
    config = ModelConfig.from_hf(hf_config, str(folder))
    named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    loaded = load_tokenizer(str(tokenizer))
    return Found(config, loaded, partial(_load, config, named, read), stop_ids(end_tokens(loaded), generation))


def _load(config: "ModelConfig", named: str, read: "Callable[[], Params]") -> "Decoder":
    import jax
    import jax.numpy as jnp

    from xlam_jax.models.params import binder

    dtype = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}.get(named, jnp.float32)

    def cast(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        return jnp.asarray(leaf, leaf.dtype if name == "router" or name.endswith("norm") else dtype)

    return binder(config, dtype=dtype)(jax.tree_util.tree_map_with_path(cast, read()))


def conversations(path: Path) -> list[list[dict[str, Any]]]:
    """Reads a messages file: a list of messages, a list of such lists, or a request object with `messages`."""
    value = read_json(path)
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{path}: holds {'an empty list' if value == [] else 'a ' + type(value).__name__}; a list of messages like "
            '[{"role": "user", "content": "…"}], or a list of such lists, is expected'
        )
    return value if isinstance(value[0], list) else [value]


def complete(
    model: "Decoder",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: list[list[int]],
    *,
    stops: "Sequence[int] | None" = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Continues rendered prompts up to one of the tokens `stops` (as in `read_completion`).

    Returns content, tool calls and why each ended, in the shape that is printed.
    """
    from xlam_jax.data.completion import named, read_completion
    from xlam_jax.data.render import end_tokens
    from xlam_jax.models.generation import generate

    stops = end_tokens(tokenizer) if stops is None else stops
    rows = generate(model, prompts, eos_id=stops, **sampling)
    answers = [read_completion(new, tokenizer, stops) for new in rows]
    return [
        {"content": one.content, "tool_calls": named(one.calls), "finish_reason": one.finish_reason} for one in answers
    ]


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m xlam_jax.generate", description="Completes conversations with a model.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, run folder or step folder")
    parser.add_argument("--messages", type=Path, required=True, help="JSON: a list of messages, or a list of lists")
    parser.add_argument("--tools", type=Path, help="JSON: a list of tool schemas in OpenAI form")
    parser.add_argument("--max-new-tokens", type=number(1, 1_000_000, int), default=256, metavar="N")
    parser.add_argument("--temperature", type=number(0, 100), default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=number(0, 1), default=1.0, help="draw among this much probability")
    parser.add_argument("--seed", type=number(0, 2**31 - 1, int), default=0)
    args = parser.parse_args()
    requests = conversations(args.messages)
    tools = None if args.tools is None else read_json(args.tools)
    found = find_model(args.model)

    from xlam_jax.data.render import render_prompt

    prompts = []
    for index, messages in enumerate(requests):
        where = str(args.messages) if len(requests) == 1 else f"{args.messages}, conversation {index}"
        try:
            prompts.append(render_prompt(messages, tools, found.tokenizer))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        limit = found.config.max_positions
        if len(prompts[-1]) >= limit:
            raise UserError(
                f"{where}: the prompt has {len(prompts[-1])} tokens, and the model {limit} positions (its "
                "max_position_embeddings), with none left to answer; shorten the conversation or the tools"
            )
        if max(prompts[-1]) >= found.config.vocab_size:
            raise UserError(
                f"{args.model}: the tokenizer makes token {max(prompts[-1])}, and the model has "
                f"{found.config.vocab_size}; they don't belong together"
            )
    answers = complete(
        found.load(),
        found.tokenizer,
        prompts,
        stops=found.stops,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
