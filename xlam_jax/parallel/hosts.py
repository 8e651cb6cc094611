"""Exchange of small values between hosts over the devices' own network."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def merged(own: dict[str, Any]) -> dict[str, Any]:
    """Returns the union of every host's JSON object, on every host. All hosts must call it together."""
    if jax.process_count() == 1:
        return own
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    whole: dict[str, Any] = {}
    for size, row in zip(sizes, texts, strict=True):
        whole |= json.loads(row[:size].tobytes())
    return whole
