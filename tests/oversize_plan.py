"""`xlam_jax.plan` with tiles that need more VMEM than a kernel may use: the real compiler refuses them."""

from xlam_jax import errors, plan
from xlam_jax.models import tiles

if __name__ == "__main__":
    tiles.product_tile = lambda shape, limit: tiles.Tile(
        tiles.row_tile(shape.rows, shape.experts), min(shape.inner, 4096), min(shape.outer, 512)
    )
    errors.run(plan.main)
