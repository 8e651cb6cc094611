"""Command-line arguments of both weight converters."""

import argparse
import re

from xlam_jax.cli import positive
from xlam_jax.weights.transfer import WORKERS

DTYPE_NAMES = ("bfloat16", "float16", "float32")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both directions share."""
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype to write (default: that of the source)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=WORKERS,
        metavar="N",
        help=f"number of tensors to convert in parallel (default: {WORKERS})",
    )
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it with the source")


def parse_size(text: str) -> int:
    """Parses a size such as 5GB into bytes. Raises `argparse.ArgumentTypeError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])
