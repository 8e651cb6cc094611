"""Files of environments' logs, for tests of their importers."""

from pathlib import Path

from xlam_jax.data.trajectory import Trajectory

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {
    "alfworld": ["mint_gpt-4-0613.jsonl", "mint_Mixtral-8x7B-Instruct-v0.1.jsonl"],
    "intercode": ["ic_bash.json", "ic_sql.json"],
    "tau_bench": ["gpt-4o-airline.json"],
    "toolalpaca": ["eval_simulated.json"],
    "api_bank": ["dialogues.jsonl"],
}
TOOLS = {"tau_bench": "airline_tools.json", "api_bank": "apis.json"}


def files(name: str) -> list[Path]:
    """Returns the log files of an environment."""
    return [FIXTURES / name / file for file in FILES[name]]


def names(trajectory: Trajectory) -> list[str]:
    """Returns the names of the tools."""
    return [tool["function"]["name"] for tool in trajectory.tools]
