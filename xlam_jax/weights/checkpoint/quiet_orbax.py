"""Orbax without its log: it logs every phase of every save, and every error once per thread.

What fails is raised by the calls that save and wait.
"""

import logging

from orbax.checkpoint import v1 as ocp

logging.getLogger("absl").setLevel(logging.CRITICAL)

__all__ = ["ocp"]
