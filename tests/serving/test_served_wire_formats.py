"""Models that memorized calls in each wire format, served by vLLM with this project's parser."""

from pathlib import Path

import memorized
import pytest
from chat_templates import TEMPLATES
from support import Commands
from test_vllm import served, with_torch  # noqa: F401 - a fixture

from xlam_jax.client.completion import xLAMChatCompletion

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_server_returns_the_memorized_calls(
    tmp_path: Path,
    commands: Commands,
    with_torch: dict[str, str],  # noqa: F811
    name: str,
):
    run = memorized.train(tmp_path, name)
    assert memorized.exact(run) == (1, 1)
    commands.run("converters.orbax_to_hf", "--checkpoint", run, "--out", tmp_path / "hf")
    wrong = []
    with (
        served(with_torch, "--model", tmp_path / "hf") as url,
        xLAMChatCompletion(url, "hf", bad_output="mark", max_tokens=160) as client,
    ):
        for row in memorized.rows(TEMPLATES[name]):
            question, answer = row["conversation"]
            expected = [(call["function"]["name"], call["function"]["arguments"]) for call in answer["tool_calls"]]
            *_, streamed = client.stream([question], row["tools"])
            for response in (client.completion([question], row["tools"]), streamed):
                assert isinstance(response, dict)
                message = response["choices"][0]["message"]
                calls = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
                if (calls, message["content"].strip()) != (expected, answer["content"]):
                    wrong.append((question["content"], message))
    assert wrong == []
