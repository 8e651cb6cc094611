"""Tile sizes of the megablox kernels: those that fit into a TPU core's scoped VMEM and move the fewest bytes.

A kernel keeps two copies of each operand's and result's block (one is used while the other is moved), an accumulator,
and spilled registers. A tile that needs more than the compiler's limit does not compile.

Sizes: `rows` of the left operand, `inner` (contracted) and `outer` sides of the weight, `experts`; bytes throughout.
"""

from collections.abc import Iterator
from typing import NamedTuple

LANES = 128
"""The last side of a block is padded to a multiple of it; sides of tiles are multiples of it, or whole axes."""
ROWS = (512, 256, 128)
"""Possible rows of a tile. A tile with rows of several experts is computed once for each of them: shorter tiles waste
less, longer ones read the weights less often. The longest that is used gives each expert 4 tiles if balanced."""
MIB = 2**20
SCOPED_VMEM = 16 * MIB
"""The compiler's limit for one kernel, on TPU v4, v5e and v5p; also used for devices that are not in this module."""
SCOPED_VMEM_BY_KIND = {"TPU v6": 32 * MIB}
"""Beginning of the device's kind → a different limit."""
SPARE = MIB // 2
"""For spilled registers beyond those of the left operand's block: at most 0.4 MiB in the modules that we compiled."""

CONTRACTED = (512, 8192)
"""Minimum and maximum contracted side: the accumulator is read and written once per contracted tile."""
OUTER = 2048
"""Maximum side of a tile's result."""
STEP = MIB // 2
"""Bytes that a chip moves in about the fixed time of one step of a kernel's grid, 0.35 µs."""
INTENSITY = 200
"""FLOPs that a chip computes in about the time that it takes to move one byte: 166 (v5p) to 560 (v6e)."""
MATRIX_UNIT = 256
"""Rows that a matrix unit multiplies while it loads the next weights: fewer rows take as long."""


class Tile(NamedTuple):
    """Sides of a kernel's tile, in the order of megablox."""

    rows: int
    inner: int
    outer: int


class Shape(NamedTuple):
    """The sizes of a product."""

    rows: int
    inner: int
    outer: int
    experts: int
    width: int
    """Bytes of an element of both operands."""
    result: int
    """Bytes of an element of the result."""


def scoped_vmem(device_kind: str) -> int:
    """The compiler's limit of VMEM per kernel, in bytes."""
    limits = (limit for kind, limit in SCOPED_VMEM_BY_KIND.items() if device_kind.startswith(kind))
    return next(limits, SCOPED_VMEM)


def row_tile(rows: int, experts: int) -> int:
    """The maximum rows of a tile for a number of assignments (`rows`); rows are padded to a multiple of it."""
    fitting = (side for side in ROWS if side * 4 * experts <= rows)
    return min(next(fitting, ROWS[-1]), _up(rows, 8))


def product_tile(shape: Shape, limit: int) -> Tile:
    """The tile for `gmm`, each row times the weight of its expert: the cheapest that needs at most `limit` bytes."""
    least, most = CONTRACTED
    # A contracted side such as 128 × 2 × 53 may have no divisor of the minimum size that fits: then a shorter one.
    for contracted in ((least, most), (LANES, most)):
        fitting = [tile for tile in _tiles(shape, contracted, (LANES, OUTER)) if product_vmem(shape, tile) <= limit]
        if fitting:
            break
    return min(fitting, key=lambda tile: _product_cost(shape, tile))


def outer_tile(shape: Shape, limit: int) -> Tile:
    """The tile for `tgmm`, the gradient of the weights: the cheapest that needs at most `limit` bytes."""
    fitting = (tile for tile in _tiles(shape, (LANES, OUTER), (LANES, OUTER)) if outer_vmem(shape, tile) <= limit)
    return min(fitting, key=lambda tile: _outer_cost(shape, tile))


def product_vmem(shape: Shape, tile: Tile) -> int:
    """Bytes of VMEM that `gmm` needs. There is no accumulator if the whole contracted side is one tile."""
    accumulated = 4 if tile.inner < shape.inner else 0
    left, result = _block(tile.rows, tile.inner, shape.width), _block(tile.rows, tile.outer, 1)
    # Which side of the weight is padded to lanes depends on whether it is transposed: take the larger block.
    weight = max(_block(tile.inner, tile.outer, shape.width), _block(tile.outer, tile.inner, shape.width))
    return 3 * left + 2 * weight + (2 * shape.result + accumulated) * result + SPARE


def outer_vmem(shape: Shape, tile: Tile) -> int:
    """Bytes of VMEM that `tgmm` needs."""
    left, right = _block(tile.rows, tile.inner, shape.width), _block(tile.rows, tile.outer, shape.width)
    return 3 * left + 2 * right + (2 * shape.result + 4) * _block(tile.inner, tile.outer, 1) + SPARE


def _product_cost(shape: Shape, tile: Tile) -> float:
    """The cost of `gmm`: bytes that it moves, with its other work as the bytes that take as long. All rows are read
    once per column of tiles; the weights are read once, or once per tile of rows if the contracted side is cut."""
    columns, cuts = _count(shape.outer, tile.outer), _count(shape.inner, tile.inner)
    visits = shape.rows // tile.rows + shape.experts
    readings = shape.experts if cuts == 1 else visits
    moved = (shape.rows * shape.inner * columns + shape.inner * shape.outer * readings) * shape.width
    return _cost(moved, columns, cuts, visits, tile)


def _outer_cost(shape: Shape, tile: Tile) -> float:
    """The cost of `tgmm`, which reads each operand once per tile of the other operand's side."""
    columns, lines = _count(shape.outer, tile.outer), _count(shape.inner, tile.inner)
    visits = shape.rows // tile.rows + shape.experts
    moved = shape.rows * (shape.inner * columns + shape.outer * lines) * shape.width
    return _cost(moved, columns, lines, visits, tile)


def _cost(moved: int, columns: int, others: int, visits: int, tile: Tile) -> float:
    steps = columns * others * visits
    computed = 2 * steps * max(tile.rows, MATRIX_UNIT) * tile.inner * tile.outer
    # The two cores of a TPU v4 or v5p share the columns: with an odd number of them one has a column less.
    shared = _up(columns, 2) / columns
    return (moved + steps * STEP + computed / INTENSITY) * shared


def _tiles(shape: Shape, inner: tuple[int, int], outer: tuple[int, int]) -> Iterator[Tile]:
    most = row_tile(shape.rows, shape.experts)
    for rows in [most, *(side for side in ROWS if side < most)]:
        for inner_side in _axis_sides(shape.inner, *inner):
            for outer_side in _axis_sides(shape.outer, *outer):
                yield Tile(rows, inner_side, outer_side)


def _axis_sides(size: int, least: int, most: int) -> list[int]:
    """The sides into which an axis may be cut: the whole axis, or multiples of the lanes that divide it. If none
    divides it, the last tile is padded."""
    whole = [size] if size <= most else []
    cut = [side for side in range(LANES, min(size, most + 1), LANES) if size % side == 0]
    if not cut:
        cut = [side for side in (LANES << at for at in range(7)) if side < size and side <= most]
    long = [side for side in cut if side >= least]
    return whole + (long or cut[-1:])


def _block(high: int, wide: int, width: int) -> int:
    return _up(high, 8) * _up(wide, LANES) * width


def _count(size: int, side: int) -> int:
    return -(-size // side)


def _up(size: int, multiple: int) -> int:
    return _count(size, multiple) * multiple
