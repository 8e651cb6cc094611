"""The command `python -m converters.trajectories`; the formats it converts are in `xlam_jax.data.converters`."""
