"""Client of OpenAI-compatible servers: requests with tools, answers with thought and calls parsed."""

from xlam_jax.client.completion import BadOutput, ServerError, to_openai, xLAMChatCompletion, xLAMConfig

__all__ = ["BadOutput", "ServerError", "to_openai", "xLAMChatCompletion", "xLAMConfig"]
