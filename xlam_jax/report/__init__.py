"""A page about runs: what they learned, how fast, from what, and what they answer."""
