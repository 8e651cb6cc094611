"""Files that appear only when they are whole."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside and renames it, in place of one that is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
