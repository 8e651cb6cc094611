"""Loaded by each Python process that a test starts: hides torch, as on a machine with only the core."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
