"""Loads tokenizers: Mistral's own, built from the files of mistral-common, and fast Hugging Face tokenizers."""

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xlam_jax import config as configs
from xlam_jax import documents
from xlam_jax.config import Data, Resolved
from xlam_jax.data.formats import as_unguarded, read_template
from xlam_jax.data.formats.template import Template
from xlam_jax.data.formats.xlam import as_earliest
from xlam_jax.data.gguf_tokenizer import read_gguf_tokenizer
from xlam_jax.data.render import chat_template, codec_and_format
from xlam_jax.digest import json_digest
from xlam_jax.errors import UserError, nearest
from xlam_jax.gguf_file import find_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MISTRAL = {
    "mistral:v1": ("tokenizer.model.v1", "mistral_v1"),
    "mistral:v3": ("mistral_instruct_tokenizer_240323.model.v3", "mistral_v3"),
}
"""Name → file in mistral-common, and the chat template that renders like it. Mistral 7B v0.1, v0.2 and Mixtral use v1,
Mistral 7B v0.3 uses v3."""


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Loads a fast tokenizer: "mistral:v1", "mistral:v3", a local Hugging Face folder, a name on the hub, or that of a
    GGUF file (or of a folder with one and without a tokenizer).

    The Mistral tokenizers give mistral-common's ids and have Mistral's chat template. Raises `UserError` when the
    tokenizer does not exist or its files are malformed.
    """
    if name in MISTRAL:
        return _mistral(*MISTRAL[name])
    if name.startswith("mistral:"):
        raise UserError(f"tokenizer '{name}': known are {', '.join(MISTRAL)}{nearest(name, MISTRAL)}")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # tokenizers work without PyTorch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    hint = f"give a folder with tokenizer.json, a name on the Hugging Face hub, or one of {', '.join(MISTRAL)}"
    has_files = (Path(name) / "tokenizer_config.json").is_file()
    gguf = None if has_files else find_gguf(name)
    if gguf is None and not has_files and (Path(name).exists() or name.startswith((".", "/", "~"))):
        raise UserError(f"tokenizer '{name}': no tokenizer_config.json there; {hint}")
    if Path(name).is_dir():
        _check_files(Path(name))
    try:
        if gguf is not None:
            tokenizer = read_gguf_tokenizer(gguf)
        else:
            tokenizer = _plain(Path(name)) or AutoTokenizer.from_pretrained(name)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            tokenizer("a")  # some errors in tokenizer.json appear only at the first use
    except UserError:
        raise
    except BaseException as error:  # transformers and tokenizers raise nearly anything for a malformed file
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"tokenizer '{name}' cannot be loaded ({reason[:300]}); {hint}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer '{name}' is a {type(tokenizer).__name__} without tokenizer.json; {hint}")
    return tokenizer


def open_tokenizer(data: Data) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a config, with the tokens that it adds and its chat template.

    Raises `UserError` as `load_tokenizer` does, for a token that the tokenizer has already, and for a template that
    cannot be read or is not valid jinja.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if data.added_tokens:
        _add_tokens(tokenizer, data)
    if data.chat_template is not None:
        tokenizer.chat_template = _read_chat_template(Path(data.chat_template))
    return tokenizer


def _add_tokens(tokenizer: "PreTrainedTokenizerFast", data: Data) -> None:
    from transformers import AddedToken

    ids, first = tokenizer.get_vocab(), len(tokenizer)
    for at, token in enumerate(data.added_tokens):
        if token.text in ids:
            raise UserError(
                f"data.added_tokens.{at}: the tokenizer {data.tokenizer} has the token {token.text!r} already, with id "
                f"{ids[token.text]}; remove it from data.added_tokens"
            )
    for token in data.added_tokens:
        added = AddedToken(token.text, normalized=False, special=token.special)
        tokenizer.add_tokens([added], special_tokens=token.special)
    numbered = [tokenizer.convert_tokens_to_ids(token.text) for token in data.added_tokens]
    if numbered != list(range(first, first + len(numbered))):
        raise UserError(
            f"data.added_tokens: the tokenizer {data.tokenizer} has {first} tokens, and gives the added ones the ids "
            f"{numbered}, as its ids have gaps; add the tokens to its files and give the model rows for them"
        )


def _read_chat_template(path: Path) -> str:
    """Reads and compiles a chat template as transformers does."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error})"
        raise UserError(f"data.chat_template: {path} cannot be read: {reason}; name a jinja file") from None
    if not template.strip():
        raise UserError(f"data.chat_template: {path} is empty; name a jinja file")
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"data.chat_template: {path}, line {error.lineno}: not valid jinja: {error.message}; correct the template"
        ) from None
    except (TemplateError, TypeError):
        pass  # it refuses this conversation; rendering reports what it refuses of the data
    return template


def with_added_tokens(resolved: Resolved) -> Resolved:
    """Returns the same run with a vocabulary that contains `data.added_tokens`; loads the tokenizer if there are any.

    Raises `UserError` as `open_tokenizer` does, and for a tokenizer with more tokens than the model.
    """
    data, size = resolved.config.data, resolved.model.vocab_size
    if not data.added_tokens:
        return resolved
    first = len(open_tokenizer(data)) - len(data.added_tokens)
    if first > size:
        raise UserError(
            f"data.tokenizer: {data.tokenizer} has {first} tokens before data.added_tokens, more than the model's "
            f"vocab_size, {size}; use the model's own tokenizer"
        )
    with_rows = configs.with_vocabulary(resolved, first)
    lora = resolved.model.lora
    if lora is None or lora.train_tokens or "embedding" in lora.targets:
        return with_rows
    return with_rows._replace(
        warnings=(
            *resolved.warnings,
            "data.added_tokens: their rows stay the mean of the others, as embedding and head are frozen, and the "
            "model cannot distinguish these tokens; set lora.train_tokens to true to train them",
        )
    )


def _check_files(folder: Path) -> None:
    """Raises `UserError` for a JSON file of a tokenizer folder that is not an object."""
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            documents.read_object(folder / name, "a file of a tokenizer is expected here; get the folder again")


def _plain(folder: Path) -> "PreTrainedTokenizerFast | None":
    """Loads a folder's tokenizer if it needs no special class, without importing every model's code; else None."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer_config.json").is_file():
        return None
    class_name = documents.read_object(folder / "tokenizer_config.json").get("tokenizer_class")
    if class_name not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return None
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def save(
    tokenizer: "PreTrainedTokenizerFast", folder: str | Path, format: str = "xlam", before: Path | None = None
) -> None:
    """Writes the tokenizer's files with the chat template of a format, so that servers render prompts as in training.

    The tokenizer object keeps its own template. `before`: the tokenizer's folder of a run that is continued; an earlier
    text of the format's template stays, because the run's checkpoints have digests of these files.
    """
    for key in ("is_local", "local_files_only"):  # options of loading, not properties of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    own = tokenizer.chat_template
    try:
        if format != "native" or not isinstance(codec_and_format(tokenizer, format)[1], Template):
            tokenizer.chat_template = chat_template(tokenizer, format)
        saved = (before or Path()) / "chat_template.jinja"
        if before and saved.is_file() and isinstance(tokenizer.chat_template, str):
            template, earlier = tokenizer.chat_template, saved.read_text(encoding="utf-8")
            if earlier in (as_unguarded(template), as_earliest(template)):
                tokenizer.chat_template = earlier
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = own


def text_to_ids_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Returns a digest of all that maps text to ids: vocabulary, merges, normalizer, pre-tokenizer, special tokens.

    It does not depend on where the tokenizer was loaded from.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for unused in ("truncation", "padding"):
        backend.pop(unused, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest([backend, special], length=16)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Returns a digest of everything that rendering uses: `text_to_ids_digest` and the chat template."""
    return json_digest([text_to_ids_digest(tokenizer), as_earliest(tokenizer.chat_template)], length=16)


def byte_fallback_bpe(pieces: Sequence[str], scores: Sequence[float], first_byte: int) -> "Tokenizer":
    """Converts a SentencePiece BPE model to a fast tokenizer that gives the same ids.

    `pieces` and their `scores` are in the order of their ids. The 256 byte pieces start at id `first_byte`; before them
    are the unknown, control and user-defined pieces, which no merge produces.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    ids = {piece: i for i, piece in enumerate(pieces)}
    first_merged = first_byte + 256
    merges: list[tuple[str, str]] = []
    for merged in sorted(range(first_merged, len(pieces)), key=lambda i: -scores[i]):
        splits = ((pieces[merged][:cut], pieces[merged][cut:]) for cut in range(1, len(pieces[merged])))
        pairs = [pair for pair in splits if min(ids.get(part, 0) for part in pair) >= first_merged]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=pieces[0], byte_fallback=True, fuse_unk=True, ignore_merges=True))
    # SentencePiece starts each run of text with a space, and writes a space as "▁"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    user_defined = [piece for piece in pieces[:first_byte] if re.fullmatch(r"\[REFERENCE_DOC_\d+\]", piece)]
    if user_defined:  # matched in any text, before merges
        pattern = "|".join(re.escape(piece) for piece in user_defined)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _mistral(file: str, template: str) -> "PreTrainedTokenizerFast":
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.find_spec("mistral_common")
    path = Path(spec.origin or "").parent / "data" / file if spec else Path(file)
    if not path.is_file():
        raise UserError(f"mistral-common has no file '{file}'; install mistral-common>=1.13")
    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    first_byte = pieces.index("<0x00>")
    backend = byte_fallback_bpe(pieces, [model.get_score(i) for i in range(len(pieces))], first_byte)
    control = [pieces[i] for i in range(first_byte) if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    unused = [piece for piece in control if piece.startswith("[control_")]
    bos, eos, unk = pieces[model.bos_id()], pieces[model.eos_id()], pieces[model.unk_id()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=unused[-1] if unused else unk,  # with byte fallback, no text is encoded as <unk>
        extra_special_tokens=[piece for piece in control if piece not in (bos, eos, unk)],
        clean_up_tokenization_spaces=False,
        chat_template=read_template(template),
    )
