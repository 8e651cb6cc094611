"""`python -m xlam_jax.config`: prints the JSON Schema of a config, for editors and checks."""

import argparse
import json

from xlam_jax import cli
from xlam_jax.config import json_schema


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m xlam_jax.config", description="Print the JSON Schema of a config file."
    ).parse_args()
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
