"""Matrix products with one rule for numerics: operands in the compute dtype, sums in f32, gradients likewise.

A product's gradient takes its cotangent in the compute dtype too, so that all three products of a layer run on the
fast path of the hardware; the weight's gradient leaves in f32, never rounded on the way to the optimizer.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xlam_jax.parallel import mesh


def project(equation: str, x: jax.Array, weight: jax.Array, dtype: Any, out: Any = None) -> jax.Array:
    """`einsum(equation, x, weight)` with both cast to `dtype`, summed in f32, returned as `out` (default `dtype`)."""
    return _project(equation, dtype, out or dtype, *mesh.alike(x, weight))


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays, summed and returned in f32."""
    if x.dtype != jnp.float32 and not _bf16_instructions():
        # A CPU that has no bf16 products converts anyway, and slower. The result is the same: those of two bf16
        # numbers are exact in f32.
        return jax.lax.platform_dependent(
            x,
            y,
            cpu=lambda x, y: jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32)),
            default=partial(jnp.einsum, equation, preferred_element_type=jnp.float32),
        )
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


@cache
def _bf16_instructions() -> bool:
    """Whether this machine's CPU multiplies bf16 numbers."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array) -> jax.Array:
    return dot(equation, x.astype(dtype), weight.astype(dtype)).astype(out)


def _forward(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array):
    return _project(equation, dtype, out, x, weight), (x, weight)


def _backward(equation: str, dtype: Any, _: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = saved
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    dy = _made_once(dy.astype(dtype))
    dx = dot(f"{result},{of_weight}->{of_x}", dy, weight.astype(dtype)).astype(x.dtype)
    dw = dot(f"{of_x},{result}->{of_weight}", x.astype(dtype), dy).astype(weight.dtype)
    return dx, dw


def _made_once(array: jax.Array) -> jax.Array:
    """On a CPU, what feeds two products is computed once; a fused copy for each would compute it twice."""
    return jax.lax.platform_dependent(array, cpu=jax.lax.optimization_barrier, default=lambda same: same)


_project.defvjp(_forward, _backward)
