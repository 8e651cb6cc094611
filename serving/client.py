"""Former import path of the client, which is now `xlam_jax.client`."""

from xlam_jax.client import BadOutput, ServerError, to_openai, xLAMChatCompletion, xLAMConfig

__all__ = ["BadOutput", "ServerError", "to_openai", "xLAMChatCompletion", "xLAMConfig"]
