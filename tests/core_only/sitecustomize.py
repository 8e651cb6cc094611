"""Read by each Python that a test starts: hides torch, as it is on a machine with the core alone."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
