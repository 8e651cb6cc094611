"""Fixed lists of names that several layers share: a config accepts them, and the code that computes looks them up."""

from typing import Literal, get_args

SpanKind = Literal["prompt", "thought", "tool_call", "arguments", "answer", "eos", "reasoning"]
SPAN_KINDS: tuple[SpanKind, ...] = get_args(SpanKind)
"""What a token is part of. `arguments` is the JSON of a call's arguments, with the space in front of it, as tokenizers
join the two; `tool_call` is the rest of the calls; `eos` is the end token of a turn; `reasoning` is a turn's reasoning
with its marks. New kinds are appended, because caches and checkpoints have stored their indices."""

PairLoss = Literal["sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo"]
PAIR_LOSSES: tuple[PairLoss, ...] = get_args(PairLoss)
"""Losses on pairs of a chosen and a rejected answer; `sigmoid` is DPO."""
UNREFERENCED: tuple[PairLoss, ...] = ("simpo", "orpo")
"""Losses on pairs that have no reference policy."""

Objective = Literal["sft", PairLoss]
"""What a run minimizes: the cross-entropy of the trained tokens, or a loss on pairs."""

PAIR_METRICS = ("rewards_chosen", "rewards_rejected", "margin", "accuracy", "log_p_chosen", "log_p_rejected", "kl")
"""What a run on pairs reports next to its loss: means over pairs."""

REQUEST_MARKS = ("parsable", "schema_valid", "right_function", "exact")
"""How an answer to a held-out request compares with the recorded one, from the weakest condition to the strictest."""

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Axes of the device mesh, from the outermost, whose devices may be on different hosts, to the innermost."""

PAIRS = "pairs"
"""The format of a source that contains pairs."""

STEPS_FOLDER = "checkpoints"
"""The folder of a run that contains a folder for each saved step."""
