"""Serving: vLLM's launch and its tool parser, the client, and a chat in the terminal."""
