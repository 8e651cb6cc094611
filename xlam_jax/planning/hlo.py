"""Parses the HLO text of a compiled module, and counts FLOPs, bytes of memory traffic, and collectives.

Loops are multiplied by their trip counts; of a conditional, the most expensive branch counts. Of an instruction, only
its results, opcode, operands and some attributes are parsed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes per element of types whose name does not contain the number of bits."""
SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
NAME = re.compile(r"%([\w.\-]+)")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
"""Custom calls that are kernels of Pallas."""
LIBRARY = re.compile(r'custom_call_target="__cublas\$')
"""Custom calls that are matrix products of a library."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
"""Opcodes that cause no memory traffic themselves."""


class Shape(NamedTuple):
    """Type of an array."""

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool = False
    """Whether it is in on-chip memory (VMEM), whose traffic is not counted."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Size in bytes without the padding of a layout."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (WIDTHS.get(self.dtype) or max(1, int(bits[0] if bits else 32) // 8))

    @property
    def traffic(self) -> int:
        """Bytes of main memory traffic to read or write it once."""
        return 0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    results: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute such as `calls=%fused`."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return NAME.findall(match[1]) if match else []

    @property
    def kernel(self) -> str:
        """The name of a custom kernel: the instruction's on a TPU, the last of its scopes on a GPU."""
        scope = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"', self.attributes)
        return scope[1] if scope and self.name.startswith("pallas_call") else re.sub(r"[.\d]+$", "", self.name)

    def numbers(self, attribute: str) -> list[int]:
        """Returns the numbers in an attribute, [1, 2] for `dimensions={1,2}`; [] without it."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in match[1].split(",") if number] if match else []


KernelFlops = Callable[[Instruction, Sequence[Shape]], float | None]


class Collective(NamedTuple):
    """A collective operation."""

    kind: str
    """Opcode without "-start"."""
    axes: tuple[str, ...]
    """Mesh axes along which its groups extend."""
    bytes: int
    """Minimum number of bytes that a device receives each time: the traffic of a ring algorithm."""
    times: int
    """Number of executions per step."""
    shapes: tuple[Shape, ...]
    """Types of its results."""
    traffic: int = 0
    """Bytes of main memory that a device reads and writes for it each time."""
    channel: str = ""
    """Its id in the module. A collective that the compiler overlaps with other work occurs in the fusion that starts
    it, in those that run meanwhile, and in the one that ends it, with the same id."""


class Totals(NamedTuple):
    """Sums over a step, per device."""

    flops: float
    bytes: float
    """Bytes that its operations read and write, each once; values inside a fusion or kernel are not counted."""
    collectives: list[Collective]
    kernels: Counter[str]
    """Custom kernel → number of executions."""
    unknown_loops: int
    """Number of loops with an unknown trip count, which are counted once."""


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in _join_lines(text):
            if header := HEADER.match(line):
                current = self.computations.setdefault(header[1], {})
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif instruction := _parse_instruction(line):
                current[instruction.name] = instruction

    def totals(self, mesh: Mapping[str, int], kernel_flops: KernelFlops) -> Totals:
        """Returns the sums over a step.

        `mesh`: axis → size. `kernel_flops` returns the FLOPs of a custom kernel with given types of operands, or None
        to use the kernel's own estimate in the module.
        """
        self._mesh, self._kernel_flops, self._cache = mesh, kernel_flops, {}
        return self._totals_of(self.entry)

    def _totals_of(self, computation: str) -> Totals:
        if computation not in self._cache:
            self._cache[computation] = self._sum(self.computations.get(computation, {}))
        return self._cache[computation]

    def _sum(self, inside: dict[str, Instruction]) -> Totals:
        flops = moved = 0.0
        collectives: list[Collective] = []
        kernels: Counter[str] = Counter()
        unknown = 0
        seen: set[str] = set()

        def add(totals: Totals, times: int = 1, *, fused: bool = False) -> None:
            nonlocal flops, moved, unknown
            flops, moved = flops + times * totals.flops, moved + (0 if fused else times * totals.bytes)
            new = [collective for collective in totals.collectives if not fused or collective.channel not in seen]
            collectives.extend(collective._replace(times=collective.times * times) for collective in new)
            seen.update(collective.channel for collective in new if collective.channel)
            if fused:
                moved += sum(collective.traffic for collective in new)
            kernels.update({kernel: times * count for kernel, count in totals.kernels.items()})
            unknown += totals.unknown_loops

        for instruction in inside.values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "while":
                trips = self._trip_count(instruction, inside)
                unknown += trips is None
                add(self._totals_of(instruction.called("body")[0]), 1 if trips is None else trips)
            elif instruction.opcode == "conditional":
                names = instruction.called("branch_computations") or _branches(instruction)
                add(max((self._totals_of(name) for name in names), key=lambda branch: branch.flops))
            elif instruction.opcode == "fusion":
                (called,) = instruction.called("calls")
                add(self._totals_of(called), fused=True)
                moved += self._fusion_bytes(instruction, called)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called("to_apply") + instruction.called("calls"):
                    add(self._totals_of(name))
            elif instruction.opcode in ("dot", "convolution"):
                flops += _product_flops(instruction, inside)
            elif instruction.opcode == "custom-call":
                operands = [inside[name].results[0] for name in instruction.operands if name in inside]
                computed = self._kernel_flops(instruction, operands)
                flops += _library_flops(instruction, operands) if computed is None else computed
                if KERNEL.search(instruction.attributes):
                    kernels[instruction.kernel] += 1
                if KERNEL.search(instruction.attributes) or LIBRARY.search(instruction.attributes):
                    moved += _traffic(instruction, inside)
            if kind in COLLECTIVES:
                collectives.append(self._collective(kind, instruction, inside))
            if instruction.opcode not in FREE | {"fusion", "custom-call", "dynamic-slice", "dynamic-update-slice"}:
                if not instruction.opcode.endswith(("-done", "-update")):
                    moved += _traffic(instruction, inside)
            elif instruction.opcode == "dynamic-slice":
                moved += 2 * instruction.results[0].traffic
            elif instruction.opcode == "dynamic-update-slice" and instruction.operands[1] in inside:
                moved += 2 * inside[instruction.operands[1]].results[0].bytes
        return Totals(flops, moved, collectives, kernels, unknown)

    def _trip_count(self, loop: Instruction, inside: dict[str, Instruction]) -> int | None:
        """Returns a loop's trip count: annotated, or from a condition `i < constant`, where i is its first value."""
        if match := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
            return int(match[1])
        condition = self.computations.get(loop.called("condition")[0], {})
        fused = [self.computations.get(name, {}) for item in condition.values() for name in item.called("calls")]
        comparisons = [
            [body[name] for name in item.operands if name in body]
            for body in (condition, *fused)
            for item in body.values()
            if item.opcode == "compare" and "direction=LT" in item.attributes
        ]
        if len(comparisons) != 1:
            return None
        limits = [_integer(operand) for operand in comparisons[0] if operand.opcode == "constant"]
        return None if len(limits) != 1 or limits[0] is None else limits[0] - _first_value(loop, inside)

    def _fusion_bytes(self, fusion: Instruction, called: str) -> float:
        """Returns the bytes that a fusion reads and writes.

        Of an operand that is only sliced, the slices count. Operands and results of a collective that runs meanwhile
        don't count, because the collective is counted separately.
        """
        body = self.computations.get(called, {})
        users: dict[str, list[Instruction]] = {}
        for instruction in body.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        collectives = [instruction for instruction in body.values() if instruction.opcode in COLLECTIVES]
        exchanged = {
            (shape.dtype, shape.sizes)
            for collective in collectives
            for shape in [*collective.results, *(shape for name in collective.operands for shape in body[name].results)]
        }
        total = float(sum(shape.traffic for shape in fusion.results if (shape.dtype, shape.sizes) not in exchanged))
        for operand in (instruction for instruction in body.values() if instruction.opcode == "parameter"):
            uses = users.get(operand.name, [])
            if uses and all(use.opcode in ("dynamic-slice", "slice") for use in uses):
                total += sum(use.results[0].bytes for use in uses) if operand.results[0].traffic else 0
            elif uses and all(use.opcode == "dynamic-update-slice" and use.operands[0] == operand.name for use in uses):
                # updated in place: only the updated part is read and written
                updates = [body[use.operands[1]] for use in uses if use.operands[1] in body]
                total += 2 * sum(update.results[0].bytes for update in updates) - operand.results[0].traffic
            else:
                total += sum(shape.traffic for shape in operand.results if (shape.dtype, shape.sizes) not in exchanged)
        return max(total, 0.0)

    def _collective(self, kind: str, instruction: Instruction, inside: dict[str, Instruction]) -> Collective:
        groups = _groups(instruction, prod(self._mesh.values()))
        size = groups.shape[1]
        positions = np.stack(np.unravel_index(groups, tuple(self._mesh.values())))
        differs = (positions != positions[:, :, :1]).any(axis=(1, 2))
        axes = tuple(axis for axis, extends in zip(self._mesh, differs, strict=True) if extends)
        operands = sum(inside[name].results[0].bytes for name in instruction.operands if name in inside)
        results = sum(shape.bytes for shape in instruction.results)
        largest = max(operands, results if instruction.opcode == kind else operands)
        if kind == "all-gather" and instruction.opcode != kind:  # results of an asynchronous one include its operands
            largest = operands * size
        fraction = 1.0 if kind == "collective-permute" else (size - 1) / size * (2 if kind == "all-reduce" else 1)
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        return Collective(
            kind,
            axes,
            bytes=int(largest * fraction),
            times=1,
            shapes=instruction.results,
            traffic=_traffic(instruction, inside),
            channel=channel[1] if channel else "",
        )


def _join_lines(text: str) -> Iterator[str]:
    """Yields lines, each instruction that spans several lines as one."""
    pending = ""
    for line in text.splitlines():
        starts = INSTRUCTION.match(line) or HEADER.match(line) or line.startswith(("}", "HloModule"))
        if starts and pending:
            yield pending
            pending = ""
        pending = line if starts else pending + line
    yield pending


def _parse_instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    rest = line[head.end() - 1 :]
    # The result type comes first, possibly a tuple. The opcode is the first word before a parenthesis after the type.
    start = _closing(rest, 1) if rest.startswith(" (") else 0
    opcode = OPCODE.search(rest, start)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in layout)
        for dtype, sizes, layout in SHAPE.findall(rest[: opcode.start()])
    )
    inner = rest[opcode.end() : end - 1]
    attributes = rest[opcode.end() - 1 :] if opcode[1] == "constant" else rest[end:]
    return Instruction(head[1], shapes, opcode[1], tuple(NAME.findall(inner)), attributes)


def _closing(text: str, opening: int) -> int:
    """Returns the index after the parenthesis that closes the one at index `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _traffic(instruction: Instruction, inside: dict[str, Instruction]) -> int:
    """Returns the bytes of main memory traffic of an instruction's operands and results, each once."""
    operands = [shape for name in instruction.operands if name in inside for shape in inside[name].results]
    return sum(shape.traffic for shape in [*instruction.results, *operands])


def _library_flops(instruction: Instruction, operands: Sequence[Shape]) -> float:
    """Returns the FLOPs of a library's matrix product, or those in a kernel's cost estimate; 0 without either."""
    if LIBRARY.search(instruction.attributes):
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = re.findall(r"\d+", axes[1]) if axes else []
        return 2.0 * instruction.results[0].elements * prod(operands[0].sizes[int(axis)] for axis in contracted)
    match = re.search(r'"flops":"?(\d+)', instruction.attributes)
    return float(match[1]) if match else 0.0


def _integer(constant: Instruction) -> int | None:
    value = re.match(r"\((-?\d+)\)", constant.attributes)
    return int(value[1]) if value and not constant.results[0].sizes else None


def _first_value(loop: Instruction, inside: dict[str, Instruction]) -> int:
    """Returns the initial value of a loop's counter, its first operand; 0 if it is not a constant."""
    values = inside.get(loop.operands[0])
    counter = inside.get(values.operands[0]) if values and values.opcode == "tuple" and values.operands else None
    while counter and counter.opcode == "copy":
        counter = inside.get(counter.operands[0])
    return (_integer(counter) or 0) if counter and counter.opcode == "constant" else 0


def _branches(instruction: Instruction) -> list[str]:
    return instruction.called("true_computation") + instruction.called("false_computation")


def _product_flops(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Returns the FLOPs of a dot or convolution: 2 per multiplied pair."""
    first, second = (inside[name].results[0] if name in inside else None for name in instruction.operands[:2])
    if first is None or second is None:
        return 0.0
    if instruction.opcode == "dot":
        contracted = prod(first.sizes[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * instruction.results[0].elements * contracted
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        return 0.0
    left, right, out = labels[1], labels[2], labels[3]
    result = dict(zip(out, instruction.results[0].sizes, strict=True))
    kernel = dict(zip(right, second.sizes, strict=True))
    source = dict(zip(left, first.sizes, strict=True))
    window = {
        key: match[1] if (match := re.search(rf"\b{key}=([\dx_\-]+)", instruction.attributes)) else ""
        for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    pairs = 1
    for index, axis in enumerate(sorted(axis for axis in out if axis.isdigit())):
        padding = int(window["pad"].split("x")[index].split("_")[0]) if window["pad"] else 0
        stride, source_dilation, kernel_dilation = (
            int(window[key].split("x")[index]) if window[key] else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        positions = np.arange(result[axis])[:, None] * stride + np.arange(kernel[axis]) * kernel_dilation - padding
        within = (positions >= 0) & (positions < (source[axis] - 1) * source_dilation + 1)
        pairs *= int((within & (positions % source_dilation == 0)).sum())
    return 2.0 * result["b"] * result["f"] * kernel["i"] * pairs


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Returns the device groups of a collective, [groups, devices per group]."""
    attributes = instruction.attributes
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        return np.array([[int(device) for device in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(device) for device in group.split(",")] for group in groups])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, whole, order = (([int(size) for size in part.split(",")] if part else None) for part in match.groups())
        ids = np.arange(devices).reshape(whole or [-1])
        return (ids.transpose(order) if order else ids).reshape(shape or [-1])
    return np.arange(devices)[None]
