"""`xlam_jax.plan` with tiles chosen for more VMEM than a kernel may use: the real compiler refuses them."""

from xlam_jax import errors, plan
from xlam_jax.models import kernels

if __name__ == "__main__":
    kernels.scoped_vmem = lambda device_kind: 64 * 2**20
    errors.run(plan.main)
