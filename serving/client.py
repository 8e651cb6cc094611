"""The client under its older address; it is `xlam_jax.client`."""

from xlam_jax.client import BadOutput, ServerError, to_openai, xLAMChatCompletion, xLAMConfig

__all__ = ["BadOutput", "ServerError", "to_openai", "xLAMChatCompletion", "xLAMConfig"]
