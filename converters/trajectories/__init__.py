"""Converters from raw trajectory formats to the unified trajectory, one module a format."""

from converters.trajectories import hammer, hotpotqa, seal_tools, webshop
from converters.trajectories.common import Convert

CONVERTERS: dict[str, Convert] = {
    "hammer": hammer.convert,
    "hotpotqa": hotpotqa.convert,
    "seal_tools": seal_tools.convert,
    "webshop": webshop.convert,
}
