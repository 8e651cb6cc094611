"""The command `python -m converters.trajectories`. Its formats are in `xlam_jax.data.converters`."""
