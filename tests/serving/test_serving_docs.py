"""The Python snippets of docs/serving.md run unchanged."""

import re

import pytest
from fake_server import call, says, serve
from support import ROOT

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet: str, capsys: pytest.CaptureFixture[str]):
    asks = says("I look.", [call("get_weather", {"location": "New York"})], "tool_calls")
    with serve(asks, says("72 °F.")) as server:
        code = re.sub(r"http://localhost:8000/v1", server.url, snippet)
        assert code != snippet
        exec(code, {})
    assert "72 °F." in capsys.readouterr().out


def test_there_are_snippets():
    assert len(SNIPPETS) == 2
