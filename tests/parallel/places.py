"""Finds a process's place from given variables and flags only."""

import re
from collections.abc import Mapping

import pytest

from xlam_jax import train
from xlam_jax.parallel import distributed
from xlam_jax.parallel.distributed import Place, find


def seek(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, *flags: object) -> Place | None:
    """Returns the place found with these variables and flags only."""
    for name in list(distributed.os.environ):
        if re.match("JOBSET|JOB_|SLURM|OMPI|MASTER|TPU_|CUDA_VIS|MEGASCALE", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parsed = train.parser().parse_args(["--config", "x", "--join-timeout", "5", *map(str, flags)])
    return find(parsed, environment)
