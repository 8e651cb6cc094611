"""Classifies compiler errors by their message: too little device memory, too little kernel memory, or another cause."""

import re
from typing import NamedTuple

DEVICE_MEMORY, KERNEL_MEMORY, COMPILER_ERROR = "device-memory", "kernel-memory", "compiler-error"
ON_CHIP = re.compile(r"memory space (?!hbm)(\w+)|scoped (vmem)", re.IGNORECASE)
SIZES = re.compile(
    r"size (?P<size>[\d.]+[KMGT]?) and limit (?P<limit>[\d.]+[KMGT]?)"
    r"|Used (?P<used>[\d.]+[KMGT]?) of (?P<capacity>[\d.]+[KMGT]?)"
)
KERNEL = re.compile(r"(?:allocating on stack for %|XLA label: )(?P<name>[\w.\-]+) = (?P<result>\w+\[[\d,]*\])?")
OPERANDS = re.compile(r"operand_layout_constraints=\{(?P<operands>[^}]*\}(?:[^}]*\})*?)\}[,.\s]")
OPERAND = re.compile(r"(?:bf|f)\d+\w*\[[\d,]+\]")


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Failure(NamedTuple):
    """Outcome and cause of a failed compilation."""

    outcome: str
    """device-memory, kernel-memory or compiler-error."""
    cause: str
    """The compiler's reason in one line."""


def is_compiler_error(error: BaseException) -> bool:
    """Returns whether the compiler (or that of kernels) refused the step, as opposed to a bug of this project."""
    import jax

    kernels = type(error).__module__.startswith("jax._src.pallas")
    return kernels or isinstance(error, (jax.errors.JaxRuntimeError, NotImplementedError))


def classify(error: BaseException) -> Failure:
    """Classifies an error of lowering or compiling a step."""
    text = str(error).strip() or type(error).__name__
    if space := ON_CHIP.search(text):
        return Failure(KERNEL_MEMORY, _kernel_cause(text, (space[1] or space[2]).upper()))
    if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
        return Failure(DEVICE_MEMORY, _device_cause(text))
    return Failure(COMPILER_ERROR, text.splitlines()[0][:300])


def needed_memory(cause: str) -> float | None:
    """Returns the bytes of device memory that the compiler needed, from a failure's cause; None if it has no figure."""
    sizes = SIZES.search(cause)
    if not sizes or not sizes["used"]:
        return None
    number = sizes["used"].rstrip("KMGT")
    return float(number) * UNITS[sizes["used"][len(number) :]]


def _kernel_cause(text: str, space: str) -> str:
    kernel, sizes = KERNEL.search(text), SIZES.search(text)
    name = "a kernel"
    if kernel:
        operands = OPERANDS.search(text, kernel.start())
        shapes = OPERAND.findall(operands["operands"]) if operands else []
        result = f" → {kernel['result']}" if kernel["result"] else ""
        name = f"the kernel {kernel['name']}" + (f" ({', '.join(shapes)}{result})" if shapes else "")
    if not sizes:
        return f"{name} needs more {space} than available: {text.splitlines()[0][:200]}"
    needed, limit = sizes["size"] or sizes["used"], sizes["limit"] or sizes["capacity"]
    return f"{name} needs {needed} of {space}, whose limit is {limit}"


def _device_cause(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    line = next((line for line in lines if "Used" in line or "Exceeded" in line), lines[0])
    return line[max(0, line.find("Ran out of memory")) :][:300]
