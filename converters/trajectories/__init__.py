"""The command that converts trajectories: `python -m converters.trajectories`. Its formats: `xlam_jax.data.converters`."""
