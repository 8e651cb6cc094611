"""Completes conversations from the command line: `python -m xlam_jax.generate --model DIR --messages FILE.json`.

Prints one JSON object per conversation: `{"content", "tool_calls", "finish_reason"}`. Prompts are rendered, and
completions parsed, by the same code as the training data.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.cli import Parser, number, run
from xlam_jax.documents import read_json
from xlam_jax.errors import UserError
from xlam_jax.gguf_config import read_gguf_config
from xlam_jax.gguf_file import find_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xlam_jax.models.config import ModelConfig
    from xlam_jax.models.decoder import Decoder
    from xlam_jax.models.params import Params


class OpenedModel(NamedTuple):
    """Config and tokenizer of a model folder. `load` reads the weights, after the requests have been checked."""

    config: "ModelConfig"
    tokenizer: "PreTrainedTokenizerFast"
    load: "Callable[[], Decoder]"
    stops: list[int]
    """Token ids that end an answer: those that ended trained turns, and those of the source's generation config."""


def find_model(folder: Path) -> OpenedModel:
    """Opens a Hugging Face folder, a GGUF file, a run folder (its newest step) or a step folder.

    Matrices are loaded, and products computed, in the dtype of the model's config; norms and routers keep their stored
    dtype. Raises `UserError` for a folder that contains no model, or no tokenizer.
    """
    from xlam_jax.data.render import end_tokens
    from xlam_jax.data.tokenizer import load_tokenizer
    from xlam_jax.models.config import ModelConfig, read_hf_config
    from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config, stop_ids
    from xlam_jax.weights import checkpoint
    from xlam_jax.weights import run as weights
    from xlam_jax.weights.hf import load_hf

    gguf = find_gguf(folder)
    if gguf is None and not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; use a Hugging Face folder, a GGUF file, a run folder or one of its steps"
        )

    def read() -> "Params":
        return load_hf(folder)[1]

    if checkpoint.is_checkpoint(folder):
        step = checkpoint.resolve(folder)
        hf_config, tokenizer = checkpoint.load_hf_config(step), checkpoint.tokenizer_dir(step)
        if tokenizer is None:
            raise UserError(
                f"{folder}: the checkpoint has no tokenizer; put one into {checkpoint.TOKENIZER}/ of the run folder"
            )
        read = partial(weights.load_whole, step)
        generation = checkpoint.load_generation_config(step)
    elif gguf is not None:
        hf_config, tokenizer, generation = read_gguf_config(gguf), gguf, None
    elif (folder / "config.json").is_file():
        hf_config, tokenizer = read_hf_config(folder / "config.json"), folder
        generation = read_generation_config(folder / GENERATION_CONFIG)
    else:
        raise UserError(
            f"{folder}: neither a Hugging Face folder (config.json is missing) nor a checkpoint (checkpoints/STEP is "
            "missing); use a folder of one of these kinds"
        )
    config = ModelConfig.from_hf(hf_config, str(folder))
    dtype = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    loaded = load_tokenizer(str(tokenizer))
    return OpenedModel(config, loaded, partial(_load, config, dtype, read), stop_ids(end_tokens(loaded), generation))


def _load(config: "ModelConfig", dtype_name: str, read: "Callable[[], Params]") -> "Decoder":
    import jax
    import jax.numpy as jnp

    from xlam_jax.models.families import frozen_storage
    from xlam_jax.models.params import binder

    dtype = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}.get(dtype_name, jnp.float32)

    def cast(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        return jnp.asarray(leaf, leaf.dtype if frozen_storage(name) == "float32" else dtype)

    return binder(config, dtype=dtype)(jax.tree_util.tree_map_with_path(cast, read()))


def conversations(path: Path) -> list[list[dict[str, Any]]]:
    """Reads a messages file: a list of messages, a list of such lists, or a request object with `messages`.

    Returns a list of conversations. Raises `UserError`.
    """
    value = read_json(path)
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{path}: contains {'an empty list' if value == [] else 'a ' + type(value).__name__}; a list of messages "
            'like [{"role": "user", "content": "…"}], or a list of such lists, is expected'
        )
    return value if isinstance(value[0], list) else [value]


def complete(
    model: "Decoder",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: list[list[int]],
    *,
    tools: "Sequence[dict[str, Any]]" = (),
    stops: "Sequence[int] | None" = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Completes rendered prompts.

    `prompts`: token ids of each prompt. `tools`: those of the requests. `stops`: token ids that end an answer;
    None: those of the tokenizer's chat template. `sampling`: options of `generate`. Returns content, tool calls, finish
    reason and reasoning of each answer, as this command prints them.
    """
    from xlam_jax.data.completion import named, read_completion
    from xlam_jax.data.render import end_tokens
    from xlam_jax.models.generation import generate

    stops = end_tokens(tokenizer) if stops is None else stops
    rows = generate(model, prompts, eos_id=stops, **sampling)
    answers = [read_completion(new, tokenizer, stops=stops, tools=tools) for new in rows]
    return [
        {"content": answer.content, "tool_calls": named(answer.calls), "finish_reason": answer.finish_reason}
        | ({"reasoning": answer.reasoning} if answer.reasoning else {})
        for answer in answers
    ]


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m xlam_jax.generate", description="Complete conversations with a model.")
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder, GGUF file, run folder or step folder"
    )
    parser.add_argument("--messages", type=Path, required=True, help="JSON: a list of messages, or a list of lists")
    parser.add_argument("--tools", type=Path, help="JSON: a list of tool schemas in OpenAI's format")
    parser.add_argument(
        "--max-new-tokens",
        type=number(1, 1_000_000, int),
        default=256,
        metavar="N",
        help="maximum number of tokens of an answer (default: 256)",
    )
    parser.add_argument(
        "--temperature", type=number(0, 100), default=0.0, help="sampling temperature; 0: greedy (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=number(0, 1), default=1.0, help="sample among tokens of this total probability (default: 1)"
    )
    parser.add_argument("--seed", type=number(0, 2**31 - 1, int), default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    requests = conversations(args.messages)
    tools = None if args.tools is None else read_json(args.tools)
    model = find_model(args.model)

    from xlam_jax.data.render import render_prompt

    prompts = []
    for index, messages in enumerate(requests):
        where = str(args.messages) if len(requests) == 1 else f"{args.messages}, conversation {index}"
        try:
            prompts.append(render_prompt(messages, tools, model.tokenizer))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        limit = model.config.max_positions
        if len(prompts[-1]) >= limit:
            raise UserError(
                f"{where}: the prompt has {len(prompts[-1])} tokens, which leaves none of the model's {limit} "
                "positions (max_position_embeddings) for an answer; shorten the conversation or the tools"
            )
        if max(prompts[-1]) >= model.config.vocab_size:
            raise UserError(
                f"{args.model}: the tokenizer produces token {max(prompts[-1])}, and the model's vocabulary has "
                f"{model.config.vocab_size}; use the model's own tokenizer"
            )
    answers = complete(
        model.load(),
        model.tokenizer,
        prompts,
        tools=tools or (),
        stops=model.stops,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
