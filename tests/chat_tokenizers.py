"""Small tokenizers with the control tokens of Qwen and Llama 3, which split text as theirs do."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
CORPUS = (
    'You are a helpful assistant with tools: call the tool for the time and the weather, in JSON, as [{"name": '
    '"get_weather", "arguments": {"city": "Oslo"}}]. If no tool is suitable, answer in text.\n\n{\n    "type": '
    '"function",\n    "function": {\n        "name": "get_time",\n        "parameters": {}\n    }\n}\n\n'
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How tokenizers of Qwen and, but for digits, of Llama 3 split a text into words."""


def byte_level(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of the kind of Qwen's and Llama 3's, with the given special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if "bos_token" in names:  # as in Llama's tokenizer.json; chats must not get it twice
        bos = (names["bos_token"], backend.token_to_id(names["bos_token"]))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    else:  # as in Qwen's
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    others = [token for token in special if token not in names.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=others, clean_up_tokenization_spaces=False, **names
    )


@cache
def tokenizer_of(variant: str) -> PreTrainedTokenizerFast:
    if variant == "qwen":
        return byte_level(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return byte_level(LLAMA, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
