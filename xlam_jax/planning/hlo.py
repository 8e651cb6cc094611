"""Reading the text of a compiled module: floating-point operations, bytes of memory, collectives.

Loops are multiplied out; of a branch the dearest side counts. Only what is read here is understood of an instruction:
its results, opcode, operands and some attributes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes of an element; of other types the name tells the bits."""
SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
NAME = re.compile(r"%([\w.\-]+)")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
"""Opcodes that move no bytes of their own."""


class Shape(NamedTuple):
    """One array's type."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many."""
        return prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Of memory; a padded layout takes more."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (WIDTHS.get(self.dtype) or max(1, int(bits[0] if bits else 32) // 8))


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    results: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return NAME.findall(found[1]) if found else []

    def numbers(self, attribute: str) -> list[int]:
        """The list of numbers of an attribute such as `dimensions={1,2}`."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(one) for one in found[1].split(",") if one] if found else []


class Collective(NamedTuple):
    """An exchange among devices."""

    kind: str
    axes: tuple[str, ...]
    """The mesh axes along which its groups extend."""
    bytes: int
    """What a device receives each time, at least: a ring's traffic."""
    times: int
    """In a step."""
    shapes: tuple[Shape, ...]
    """What it gives."""


class Totals(NamedTuple):
    """Of one device and one step."""

    flops: float
    bytes: float
    """That its operations read and write; what a fusion keeps to itself is not counted."""
    collectives: list[Collective]
    kernels: Counter[str]
    """How often each custom kernel runs."""
    unknown_loops: int
    """Loops whose length is only known when they run; counted once."""


class Module:
    """A parsed module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in _joined(text):
            if header := HEADER.match(line):
                current = self.computations.setdefault(header[1], {})
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def totals(self, mesh: Mapping[str, int], kernel_flops: Callable[[Instruction], float | None]) -> Totals:
        """Sums over a step on a mesh of these axis sizes; `kernel_flops` knows what a custom kernel computes, or None
        where its own estimate is to be taken."""
        self._mesh, self._kernel_flops, self._cache = mesh, kernel_flops, {}
        return self._of(self.entry)

    def _of(self, name: str) -> Totals:
        if name not in self._cache:
            self._cache[name] = self._sum(self.computations.get(name, {}))
        return self._cache[name]

    def _sum(self, inside: dict[str, Instruction]) -> Totals:
        flops = moved = 0.0
        exchanged: list[Collective] = []
        kernels: Counter[str] = Counter()
        unknown = 0

        def add(totals: Totals, times: int = 1, *, fused: bool = False) -> None:
            nonlocal flops, moved, unknown
            flops, moved = flops + times * totals.flops, moved + (0 if fused else times * totals.bytes)
            exchanged.extend(one._replace(times=one.times * times) for one in totals.collectives)
            kernels.update({kernel: times * count for kernel, count in totals.kernels.items()})
            unknown += totals.unknown_loops

        for one in inside.values():
            kind = one.opcode.removesuffix("-start")
            if one.opcode == "while":
                trips = self._trips(one, inside)
                unknown += trips is None
                add(self._of(one.called("body")[0]), 1 if trips is None else trips)
            elif one.opcode == "conditional":
                sides = [self._of(name) for name in one.called("branch_computations") or _sides(one)]
                add(max(sides, key=lambda side: side.flops))
            elif one.opcode == "fusion":
                (called,) = one.called("calls")
                add(self._of(called), fused=True)
                moved += self._fusion_bytes(one, called, inside)
            elif one.opcode in ("call", "async-start"):
                for name in one.called("to_apply") + one.called("calls"):
                    add(self._of(name))
            elif one.opcode in ("dot", "convolution"):
                flops += _product_flops(one, inside)
            elif one.opcode == "custom-call":
                told, estimated = self._custom(one)
                flops += told
                moved += estimated
                if "tpu_custom_call" in one.attributes or "triton" in one.attributes:
                    kernels[re.sub(r"[.\d]+$", "", one.name)] += 1
            if kind in COLLECTIVES:
                exchanged.append(self._collective(kind, one, inside))
            if one.opcode not in FREE | {"fusion", "custom-call", "dynamic-slice", "dynamic-update-slice"}:
                if not one.opcode.endswith(("-done", "-update")):
                    moved += sum(shape.bytes for shape in one.results)
                    moved += sum(
                        shape.bytes for name in one.operands if name in inside for shape in inside[name].results
                    )
            elif one.opcode == "dynamic-slice":
                moved += 2 * one.results[0].bytes
            elif one.opcode == "dynamic-update-slice" and one.operands[1] in inside:
                moved += 2 * inside[one.operands[1]].results[0].bytes
        return Totals(flops, moved, exchanged, kernels, unknown)

    def _custom(self, one: Instruction) -> tuple[float, float]:
        """FLOPs and bytes of a custom call: as we know them, or as it estimates them itself."""
        estimate = {
            key: float(found[1]) if (found := re.search(rf'"{key}":"?(\d+)', one.attributes)) else 0.0
            for key in ("flops", "bytes_accessed")
        }
        known = self._kernel_flops(one)
        return (estimate["flops"] if known is None else known), estimate["bytes_accessed"]

    def _trips(self, loop: Instruction, inside: dict[str, Instruction]) -> int | None:
        """How often a loop runs: as it is annotated, or from a condition `i < constant` with i counted from 0."""
        if found := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
            return int(found[1])
        condition = self.computations.get(loop.called("condition")[0], {})
        ends = [one for one in condition.values() if one.opcode == "compare" and "direction=LT" in one.attributes]
        for end in ends:
            limits = [condition[name] for name in end.operands if name in condition]
            values = [re.match(r"\((-?\d+)\)", one.attributes) for one in limits if one.opcode == "constant"]
            if len(ends) == 1 and len(values) == 1 and values[0] and not limits[0].results[0].sizes:
                return int(values[0][1])
        return None

    def _fusion_bytes(self, fusion: Instruction, called: str, inside: dict[str, Instruction]) -> float:
        """What a fusion reads and writes: of an operand that it only takes slices of, those."""
        body = self.computations.get(called, {})
        users: dict[str, list[Instruction]] = {}
        for one in body.values():
            for name in one.operands:
                users.setdefault(name, []).append(one)
        total = float(sum(shape.bytes for shape in fusion.results))
        parameters = [one for one in body.values() if one.opcode == "parameter"]
        for one in parameters:
            uses = users.get(one.name, [])
            if uses and all(use.opcode == "dynamic-slice" for use in uses):
                total += sum(use.results[0].bytes for use in uses)
            elif uses and all(use.opcode == "dynamic-update-slice" and use.operands[0] == one.name for use in uses):
                # written in place: neither is all of it read nor all of the result written
                updates = [body[use.operands[1]] for use in uses if use.operands[1] in body]
                total += 2 * sum(update.results[0].bytes for update in updates) - one.results[0].bytes
            else:
                total += sum(shape.bytes for shape in one.results)
        return max(total, 0.0)

    def _collective(self, kind: str, one: Instruction, inside: dict[str, Instruction]) -> Collective:
        groups = _groups(one, prod(self._mesh.values()))
        size = groups.shape[1]
        places = np.stack(np.unravel_index(groups, tuple(self._mesh.values())))
        differs = (places != places[:, :, :1]).any(axis=(1, 2))
        axes = tuple(axis for axis, extends in zip(self._mesh, differs, strict=True) if extends)
        given = sum(inside[name].results[0].bytes for name in one.operands if name in inside)
        largest = max(given, sum(shape.bytes for shape in one.results) if one.opcode == kind else given)
        if kind == "all-gather" and one.opcode != kind:  # an asynchronous one has operands among its results
            largest = given * size
        share = 1.0 if kind == "collective-permute" else (size - 1) / size * (2 if kind == "all-reduce" else 1)
        return Collective(kind, axes, int(largest * share), 1, one.results)


def _joined(text: str) -> Iterator[str]:
    """Lines, those of an instruction that goes over several put together."""
    held = ""
    for line in text.splitlines():
        starts = INSTRUCTION.match(line) or HEADER.match(line) or line.startswith(("}", "HloModule"))
        if starts and held:
            yield held
            held = ""
        held = line if starts else held + line
    yield held


def _instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    rest = line[head.end() - 1 :]
    # The type comes first, maybe a tuple's; the opcode is the first word right before a parenthesis after it.
    start = _closed(rest, 1) if rest.startswith(" (") else 0
    opcode = OPCODE.search(rest, start)
    if not opcode:
        return None
    end = _closed(rest, opcode.end() - 1)
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in SHAPE.findall(rest[: opcode.start()])
    )
    inner = rest[opcode.end() : end - 1]
    attributes = rest[opcode.end() - 1 :] if opcode[1] == "constant" else rest[end:]
    return Instruction(head[1], shapes, opcode[1], tuple(NAME.findall(inner)), attributes)


def _closed(text: str, at: int) -> int:
    """Where the parenthesis that opens at a place is closed, and one further."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _sides(one: Instruction) -> list[str]:
    return one.called("true_computation") + one.called("false_computation")


def _product_flops(one: Instruction, inside: dict[str, Instruction]) -> float:
    """2 operations for each pair that is multiplied."""
    first, second = (inside[name].results[0] if name in inside else None for name in one.operands[:2])
    if first is None or second is None:
        return 0.0
    if one.opcode == "dot":
        return 2.0 * one.results[0].elements * prod(first.sizes[axis] for axis in one.numbers("lhs_contracting_dims"))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if not labels:
        return 0.0
    left, right, out = labels[1], labels[2], labels[3]
    result = dict(zip(out, one.results[0].sizes, strict=True))
    kernel = dict(zip(right, second.sizes, strict=True))
    source = dict(zip(left, first.sizes, strict=True))
    window = {
        key: found[1] if (found := re.search(rf"\b{key}=([\dx_\-]+)", one.attributes)) else ""
        for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    pairs = 1
    for at, axis in enumerate(sorted(axis for axis in out if axis.isdigit())):
        low = int(window["pad"].split("x")[at].split("_")[0]) if window["pad"] else 0
        stride, spread, reach = (
            int(window[key].split("x")[at]) if window[key] else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        places = np.arange(result[axis])[:, None] * stride + np.arange(kernel[axis]) * reach - low
        pairs *= int(((places >= 0) & (places < (source[axis] - 1) * spread + 1) & (places % spread == 0)).sum())
    return 2.0 * result["b"] * result["f"] * kernel["i"] * pairs


def _groups(one: Instruction, devices: int) -> np.ndarray:
    """[groups, devices of a group]."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", one.attributes):
        return np.array([[int(device) for device in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", one.attributes):
        groups = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([[int(device) for device in group.split(",")] for group in groups])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes):
        shape, whole, order = (([int(size) for size in part.split(",")] if part else None) for part in found.groups())
        ids = np.arange(devices).reshape(whole or [-1])
        return (ids.transpose(order) if order else ids).reshape(shape or [-1])
    return np.arange(devices)[None]
