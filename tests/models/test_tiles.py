"""Tiles of the megablox kernels: they fit the chip's scoped VMEM, and the compiler agrees."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.models import tiles
from xlam_jax.models.tiles import MIB, Shape, Tile, outer_tile, outer_vmem, product_tile, product_vmem
from xlam_jax.planning.failures import classify
from xlam_jax.planning.hardware import parse

LIMITS = (16 * MIB, 32 * MIB)
SIDES = st.one_of(st.integers(1, 20_000), st.integers(1, 160).map(lambda count: count * 128))
SHAPES = st.builds(
    Shape,
    rows=st.one_of(
        st.integers(1, 20).map(lambda count: count * 8), st.integers(1, 2048).map(lambda count: count * 128)
    ),
    inner=SIDES,
    outer=SIDES,
    experts=st.sampled_from([1, 2, 4, 8, 16, 60, 128]),
    width=st.sampled_from([2, 4]),
    result=st.sampled_from([2, 4]),
)
UP_OF_8X7B = Shape(rows=0, inner=4096, outer=14336, experts=8, width=2, result=2)
"""Its rows are those of a test."""


@settings(deadline=None)  # a busy machine is not a failure
@example(Shape(rows=120, inner=13568, outer=1, experts=1, width=4, result=2), 16 * tiles.MIB)
@given(shape=SHAPES, limit=st.sampled_from(LIMITS))
def test_every_shape_has_a_tile_that_fits(shape: Shape, limit: int):
    shape = shape._replace(rows=-(-shape.rows // (tile := tiles.row_tile(shape.rows, shape.experts))) * tile)
    for choose, vmem in ((product_tile, product_vmem), (outer_tile, outer_vmem)):
        chosen = choose(shape, limit)
        assert vmem(shape, chosen) <= limit
        assert shape.rows % chosen.rows == 0
        assert chosen.rows <= tiles.row_tile(shape.rows, shape.experts)
        for side, size in ((chosen.inner, shape.inner), (chosen.outer, shape.outer)):
            assert side == size or (side < size and side % 128 == 0)
            # the last tile is filled up only where no side in lanes divides the axis
            assert size % side == 0 or size % 128 != 0


@pytest.mark.parametrize(
    ("vmem", "inner", "outer", "tile", "width", "result", "compiler"),
    [
        (product_vmem, 4096, 14336, (256, 4096, 512), 2, 2, 14.64),
        (product_vmem, 4096, 14336, (512, 4096, 512), 2, 2, 21.47),
        (product_vmem, 4096, 14336, (512, 4096, 512), 2, 4, 22.29),
        (product_vmem, 14336, 4096, (512, 3584, 512), 2, 2, 19.80),
        (product_vmem, 14336, 4096, (512, 1024, 1024), 2, 4, 13.36),
        (product_vmem, 4096, 4096, (512, 512, 2048), 2, 4, 17.68),
        (product_vmem, 4096, 2048, (512, 2048, 512), 2, 4, 13.29),
        (product_vmem, 4096, 2048, (128, 4096, 256), 2, 4, 7.12),
        (product_vmem, 5000, 2000, (256, 1024, 512), 2, 4, 5.12),
        (product_vmem, 4096, 2048, (256, 2048, 512), 4, 4, 13.55),
        (outer_vmem, 4096, 14336, (512, 512, 1024), 2, 4, 9.54),
        (outer_vmem, 4096, 2048, (256, 1024, 1024), 2, 4, 14.48),
        (outer_vmem, 4096, 4096, (512, 512, 2048), 2, 4, 17.56),
        (outer_vmem, 4096, 32, (256, 4096, 32), 2, 4, 10.88),
        (outer_vmem, 4096, 2048, (256, 512, 1024), 4, 4, 9.20),
    ],
)
def test_no_tile_needs_more_than_computed(
    vmem: Callable[[Shape, Tile], int],
    inner: int,
    outer: int,
    tile: tuple[int, int, int],
    width: int,
    result: int,
    compiler: float,
):
    """MiB that libtpu 0.0.52 reported for a v5p, with a limit lowered until it refused the kernel."""
    computed = vmem(Shape(8192, inner, outer, 8, width, result), Tile(*tile)) / MIB
    assert compiler <= computed <= compiler + 2.5


def test_one_row_of_mixtral_keeps_its_tile():
    assert product_tile(UP_OF_8X7B._replace(rows=8192), 16 * MIB) == (256, 4096, 512)


@pytest.mark.parametrize(("kind", "limit"), [("TPU v5", 16), ("TPU v5 lite", 16), ("TPU v6 lite", 32), ("cpu", 16)])
def test_the_limit_is_the_chips(kind: str, limit: int):
    assert tiles.scoped_vmem(kind) == limit * MIB


class Kernel(NamedTuple):
    """A call of megablox."""

    shape: Shape
    tile: Tile
    transposed: bool = False
    """Of the weight; of a product only."""
    outer: bool = False
    """tgmm instead of gmm."""

    def compile(self, topology: str) -> None:
        """Raises what the compiler for one chip of this topology raises."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

        shape, dtype = self.shape, jnp.bfloat16
        result = {2: jnp.bfloat16, 4: jnp.float32}[shape.result]
        weight = (shape.experts, *((shape.outer, shape.inner) if self.transposed else (shape.inner, shape.outer)))
        sizes = [(shape.rows, shape.inner), (shape.rows, shape.outer) if self.outer else weight]
        chip = jax.sharding.SingleDeviceSharding(parse(topology).devices()[0])
        operands = [jax.ShapeDtypeStruct(size, dtype, sharding=chip) for size in sizes]
        operands.append(jax.ShapeDtypeStruct((shape.experts,), jnp.int32, sharding=chip))

        def call(left: jax.Array, right: jax.Array, rows_E: jax.Array) -> jax.Array:
            if self.outer:
                return tgmm(left.T, right, rows_E, result, self.tile)
            return gmm(left, right, rows_E, result, self.tile, transpose_rhs=self.transposed)

        jax.jit(call).lower(*operands).compile()


@pytest.mark.usefixtures("offline_compiler")
def test_the_compiler_takes_the_tile_for_two_rows_of_mixtral():
    """The tile of 512 rows, which fits a limit of 32 MiB, was chosen whatever the chip."""
    shape = UP_OF_8X7B._replace(rows=16384)
    Kernel(shape, product_tile(shape, 16 * MIB)).compile("v5p:2x2x1")
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        Kernel(shape, Tile(512, 4096, 512)).compile("v5p:2x2x1")
    outcome, cause = classify(refused.value)
    assert outcome == "kernel-memory"
    assert cause == (
        "the kernel gmm.1 (bf16[16384,4096], bf16[8,4096,14336] → bf16[16384,14336]) needs 17.00M of VMEM, "
        "whose limit is 16.00M"
    )


def kernels_of_presets(limit: int) -> list[Kernel]:
    """All grouped products of all presets, at 1, 2, 4 and 8 rows per chip, of 4096 tokens and of as many as the preset
    has: one for each tile, result and pair of sides. Where weights are frozen, their gradients are skipped."""
    kernels: dict[object, Kernel] = {}
    for path in sorted((ROOT / "configs").glob("mixtral*.yaml")):
        resolved = configs.load(path)
        config, model = resolved.config, resolved.model
        across = ((model.hidden_size, model.mlp_size), (model.mlp_size, model.hidden_size))
        for rows, tokens, (inner, outer) in product((1, 2, 4, 8), sorted({4096, config.data.sequence_length}), across):
            count = rows * tokens * model.experts_per_token
            forward, backward = (Shape(count, inner, outer, model.experts, 2, result) for result in (2, 4))
            calls = [Kernel(forward, product_tile(forward, limit))]
            calls.append(Kernel(backward, product_tile(backward, limit), transposed=True))
            if model.lora is None:
                calls.append(Kernel(backward, outer_tile(backward, limit), outer=True))
            for call in calls:  # that of the fewest rows, whose operands fit every chip
                kernels.setdefault(call._replace(shape=call.shape._replace(rows=0)), call)
    return list(kernels.values())


@pytest.mark.slow
@pytest.mark.usefixtures("offline_compiler")
@pytest.mark.parametrize(("topology", "limit"), [("v5e:1x1", 16), ("v5p:2x2x1", 16), ("v6e:1x1", 32)])
def test_every_tile_of_every_preset_compiles(topology: str, limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    kernels = kernels_of_presets(limit * MIB)
    assert len(kernels) >= 20
    for kernel in kernels:
        kernel.compile(topology)
