"""Fine-tuning of Mistral and Mixtral for tool calling, in JAX."""

from xlam_jax import cuda_plugin, tpu_library

tpu_library.hide()
cuda_plugin.hide()
