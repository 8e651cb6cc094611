"""Matrix products with one rule for numerics: operands in the compute dtype, sums in f32, gradients likewise.

A product's gradient takes its cotangent in the compute dtype too, so that all three products of a layer run on the
fast path of the hardware; the weight's gradient leaves in f32, never rounded on the way to the optimizer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xlam_jax.parallel import mesh


def project(
    equation: str, x: jax.Array, weight: jax.Array, dtype: Any, out: Any = None
) -> jax.Array:
    """`einsum(equation, x, weight)` with both cast to `dtype`, summed in f32, returned as `out` (default `dtype`)."""
    return _project(equation, dtype, out or dtype, *mesh.alike(x, weight))


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays, summed and returned in f32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array) -> jax.Array:
    return dot(equation, x.astype(dtype), weight.astype(dtype)).astype(out)


def _forward(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array):
    return _project(equation, dtype, out, x, weight), (x, weight)


def _backward(equation: str, dtype: Any, _: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = saved
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    dy = dy.astype(dtype)
    dx = dot(f"{result},{of_weight}->{of_x}", dy, weight.astype(dtype)).astype(x.dtype)
    dw = dot(f"{of_x},{result}->{of_weight}", x.astype(dtype), dy).astype(weight.dtype)
    return dx, dw


_project.defvjp(_forward, _backward)
