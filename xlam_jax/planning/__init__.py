"""Resources of a training step on other machines: read from a compiled module if possible, otherwise computed."""
