"""bfcl-eval's own evaluator and generator, in a separate process.

`python bfcl_official.py scores ANSWERS.json OUT.json`: ANSWERS maps categories to entries of its result files, OUT maps
them to the ids of wrong entries. `python bfcl_official.py prompts CATEGORIES.json OUT.json`: OUT maps the ids of the
categories' tasks to the content of a request: tools, held-back tools, and the system prompt of the other mode.

Modules that they import but do not use for a model with function calling are replaced before the import.
"""
# pyright: reportMissingImports=false

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


def main(command: str, input_path: Path, out: Path) -> None:
    for name in UNUSED:
        sys.modules[name] = MagicMock(name=name)
    sys.modules["overrides"].final = lambda method: method  # type: ignore[attr-defined]
    models: Any = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    sys.modules[models.__name__] = models
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BFCL_PROJECT_ROOT": folder, "OPENAI_API_KEY": "none"}
        output = {"scores": scores, "prompts": make_prompts}[command](json.loads(input_path.read_text()), Path(folder))
    out.write_text(json.dumps(output))


def scores(answers: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    from bfcl_eval.eval_checker import eval_runner as official
    from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

    handler = OpenAICompletionsHandler(MODEL, 0, MODEL, is_fc_model=True)
    wrong_ids = {}
    for category, entries in answers.items():
        wrong: list[str] = []

        def save(result: list[dict[str, Any]], right: int, *_: Any, wrong: list[str] = wrong, **__: Any) -> Any:
            wrong.extend(entry["id"] for entry in result)
            return right, len(result)

        official.save_eval_results = save
        official.record_cost_latency = official.record_result = lambda *_: None
        official.evaluate_task(category, None, folder, entries, MODEL, handler, {}, allow_missing=True)
        wrong_ids[category] = wrong
    return wrong_ids


def make_prompts(categories: list[str], folder: Path) -> dict[str, Any]:
    from bfcl_eval.constants.enums import ModelStyle
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
    from bfcl_eval.model_handler.utils import convert_to_tool, system_prompt_pre_processing_chat_model
    from bfcl_eval.utils import load_dataset_entry

    prompts = {}
    for category in categories:
        for entry in load_dataset_entry(category):
            tools, held_back = (
                convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS)
                for functions in (
                    entry["function"],
                    [function for missed in entry.get("missed_function", {}).values() for function in missed],
                )
            )
            first = system_prompt_pre_processing_chat_model(entry["question"][0], entry["function"], entry["id"])
            prompts[entry["id"]] = [tools, held_back, first]
    return prompts


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
