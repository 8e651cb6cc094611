"""bfcl-eval's own evaluator on recorded answers: `python bfcl_official.py ANSWERS.json SCORES.json`.

ANSWERS: category → entries of bfcl-eval's files of results. SCORES: category → the ids that it found wrong. What the
evaluator imports and does not use for a model that calls functions is replaced before it is imported.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

MODEL = "recorded"
UNUSED = ("dotenv", "tenacity", "overrides", "tree_sitter", "tree_sitter_java", "tree_sitter_javascript")


def main(answers: Path, scores: Path) -> None:
    for name in UNUSED:
        sys.modules[name] = MagicMock(name=name)
    sys.modules["overrides"].final = lambda method: method  # type: ignore[attr-defined]
    models: Any = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    sys.modules[models.__name__] = models

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BFCL_PROJECT_ROOT": folder, "OPENAI_API_KEY": "none"}
        from bfcl_eval.eval_checker import eval_runner as official
        from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

        handler = OpenAICompletionsHandler(MODEL, 0, MODEL, is_fc_model=True)
        found = {}
        for category, entries in json.loads(answers.read_text()).items():
            wrong: list[str] = []

            def save(result: list[dict[str, Any]], right: int, *_: Any, wrong: list[str] = wrong, **__: Any) -> Any:
                wrong.extend(one["id"] for one in result)
                return right, len(result)

            official.save_eval_results = save
            official.record_cost_latency = official.record_result = lambda *_: None
            official.evaluate_task(category, None, Path(folder), entries, MODEL, handler, {}, allow_missing=True)
            found[category] = wrong
    scores.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
