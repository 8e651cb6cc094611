"""A page about training runs: losses, sources, speed, and answers to held-out requests."""
