"""Client for OpenAI-compatible servers: sends messages and tools, parses thoughts and tool calls of the answers."""

from xlam_jax.client.completion import BadOutput, ServerError, to_openai, xLAMChatCompletion, xLAMConfig

__all__ = ["BadOutput", "ServerError", "to_openai", "xLAMChatCompletion", "xLAMConfig"]
