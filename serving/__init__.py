"""Serves models with vLLM: launch command, tool parser, parity check, FastChat worker, and a terminal chat."""
