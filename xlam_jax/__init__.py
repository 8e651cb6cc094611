"""Fine-tuning of Mistral and Mixtral for tool calling, in JAX."""

from xlam_jax import tpu_library

tpu_library.hide()
