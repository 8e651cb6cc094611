"""Trains and serves a Mixtral, and a Mistral with an adapter, and queries them with OpenAI's client and ours."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_corpus
from support import ROOT, Commands

from xlam_jax.client.completion import ServerError, xLAMChatCompletion
from xlam_jax.evaluate import agents, shop

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore")]

QUICKSTART = ("--config", "configs/quickstart.yaml", "train.warmup_steps=0", "data.sequence_length=512")
REQUESTS = [[{"role": "user", "content": text}] for text in ("Weather in Oslo?", "Search for shoes.", "Turn it off!")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "toggle",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "level": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["on", "level"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Paris"]}, "name": {"$ref": "#/$defs/name"}},
                "required": ["city", "name"],
                "additionalProperties": False,
                "$defs": {"name": {"type": "object", "properties": {"first": {"enum": ["Bo", "}]"]}},
                                   "required": ["first"], "additionalProperties": False}},
            },
        },
    },
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def with_torch(environment: dict[str, str]) -> dict[str, str]:
    """The environment of commands, with vLLM's variables."""
    return environment | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextmanager
def served(environment: dict[str, str], *arguments: object) -> Iterator[str]:
    """Runs a server. Yields its URL up to /v1 when it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "serving.serve", "--port", str(port), "--timeout", "400", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log: list[str] = []
    assert process.stdout
    assert process.stderr
    reader = threading.Thread(target=log.extend, args=(process.stderr,))
    reader.start()
    try:
        ready = process.stdout.readline()
        if not ready.startswith("ready: "):
            process.wait()
            reader.join()
            raise AssertionError("".join(log[-60:]))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
        reader.join()


def generated(commands: Commands, model: Path, folder: Path, tokens: int = 24) -> list[dict[str, Any]]:
    """JAX's answers to the requests."""
    (folder / "messages.json").write_text(json.dumps(REQUESTS))
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    out = commands.run(
        "xlam_jax.generate", "--model", model, "--messages", folder / "messages.json",
        "--tools", folder / "tools.json", "--max-new-tokens", tokens,
    ).stdout  # fmt: skip
    return [json.loads(line) for line in out.splitlines()]


def answered(url: str, model: str, tokens: int = 24) -> list[dict[str, Any]]:
    """The server's answers to the requests in the format of `generated`. Checks that streamed ones are equal."""
    llm = xLAMChatCompletion(url, model, bad_output="mark", max_tokens=tokens)
    answers = []
    for messages in REQUESTS:
        choice = llm.completion(messages, TOOLS)["choices"][0]
        *_, streamed = llm.stream(messages, TOOLS)
        assert isinstance(streamed, dict)
        other = streamed["choices"][0]
        for received in (choice, other):
            for call in received["message"]["tool_calls"]:
                call.pop("id")
        assert choice == other
        message = choice["message"]
        answers.append(
            {
                "content": message["content"].strip(),
                "tool_calls": message["tool_calls"],
                "finish_reason": choice["finish_reason"],
            }
        )
    return answers


@pytest.fixture(scope="module")
def mixtral(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Mixtral."""
    run = tmp_path_factory.mktemp("mixtral") / "run"
    commands.run("xlam_jax.train", *QUICKSTART, "train.steps=40", f"output_dir={run}")
    return run


@pytest.fixture(scope="module")
def url(mixtral: Path, with_torch: dict[str, str]) -> Iterator[str]:
    """The run, exported and served under the name tiny."""
    with served(with_torch, "--model", mixtral, "--served-model-name", "tiny") as url:
        yield url


def test_the_served_model_answers_as_jax_does(url: str, mixtral: Path, commands: Commands, tmp_path: Path):
    [exported] = mixtral.glob("served-*")
    assert answered(url, "tiny") == generated(commands, exported, tmp_path)


def test_parity_with_the_checkpoint(url: str, mixtral: Path, commands: Commands):
    """Prompts, log-probabilities, greedy tokens and calls are equal; another checkpoint is detected."""
    [exported] = mixtral.glob("served-*")
    output = commands.run("serving.parity", "--checkpoint", exported, "--base-url", url, "--max-new-tokens", 16).stdout
    assert "answer 2 of 2 requests alike" in output
    other = mixtral.parent / "other"
    commands.run("xlam_jax.train", *QUICKSTART, "train.steps=2", "seed=1", f"output_dir={other}")
    output = commands.run("serving.parity", "--checkpoint", other, "--base-url", url, code=1).stdout
    assert "request 0: differs in the weights" in output


def both(url: str, **request: Any) -> tuple[list[tuple[str, Any]], str | None]:
    """Calls and finish reason from OpenAI's client. Checks that streamed and whole answers are equal."""
    from openai import OpenAI

    llm = OpenAI(base_url=url, api_key="EMPTY")
    request = {"model": "tiny", "messages": REQUESTS[0], "tools": TOOLS, "temperature": 0, "max_tokens": 200} | request
    choice = llm.chat.completions.create(**request).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    streamed: dict[int, list[str]] = {}
    content, ended = "", None
    for chunk in llm.chat.completions.create(**request, stream=True):
        for piece in chunk.choices:
            ended = piece.finish_reason or ended
            content += piece.delta.content or ""
            for call in piece.delta.tool_calls or ():
                parts = streamed.setdefault(call.index, ["", ""])
                assert call.function
                parts[0] += call.function.name or ""
                parts[1] += call.function.arguments or ""
    assert [tuple(parts) for parts in streamed.values()] == calls
    assert (content, ended) == (choice.message.content or "", choice.finish_reason)
    return [(name, json.loads(arguments)) for name, arguments in calls], ended


def valid(calls: list[tuple[str, Any]]) -> bool:
    from jsonschema import Draft202012Validator

    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    return bool(calls) and all(Draft202012Validator(schemas[name]).is_valid(arguments) for name, arguments in calls)


def test_required_and_named_calls(url: str):
    calls, ended = both(url, tool_choice="required", parallel_tool_calls=False)
    assert valid(calls)
    assert (len(calls), ended) == (1, "tool_calls")
    for name in ("toggle", "get_weather"):
        calls, _ = both(url, tool_choice={"type": "function", "function": {"name": name}})
        assert [name] == [called for called, _ in calls]
        assert valid(calls)
    assert both(url, tool_choice="none")[0] == []


def test_without_tools_calls_in_the_text_are_content(url: str):
    """The output is constrained to calls."""
    from openai import OpenAI

    from serving.constraint import calls_schema

    forced = {"type": "json_schema", "json_schema": {"name": "calls", "schema": calls_schema(TOOLS, at_most=2)}}
    llm = OpenAI(base_url=url, api_key="EMPTY")
    request: dict[str, Any] = {"model": "tiny", "messages": REQUESTS[0], "temperature": 0, "max_tokens": 200}
    for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        constrained: dict[str, Any] = request | tools | {"response_format": forced}
        choice = llm.chat.completions.create(**constrained).choices[0]
        assert {call["name"] for call in json.loads(choice.message.content or "")} <= {"toggle", "get_weather"}
        assert (choice.message.tool_calls or [], choice.finish_reason) == ([], "stop")
        content = ""
        for chunk in llm.chat.completions.create(**constrained, stream=True):
            for piece in chunk.choices:
                content += piece.delta.content or ""
                assert not piece.delta.tool_calls
        assert content == choice.message.content


def test_required_and_named_calls_of_the_responses_api(url: str):
    from openai import OpenAI

    llm = OpenAI(base_url=url, api_key="EMPTY")
    tools: Any = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS]
    request: dict[str, Any] = {"model": "tiny", "input": "Weather in Oslo?", "tools": tools, "temperature": 0}
    named = {"type": "function", "name": "get_weather"}
    for choice, names in (("required", {"toggle", "get_weather"}), (named, {"get_weather"})):
        required = request | {"tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 200}
        [call] = llm.responses.create(**required).output
        assert call.type == "function_call"
        assert call.name in names
        assert valid([(call.name, json.loads(call.arguments))])
        done = [event.item for event in llm.responses.create(**required, stream=True)
                if event.type == "response.output_item.done"]  # fmt: skip
        assert [(item.name, item.arguments) for item in done if item.type == "function_call"] == [
            (call.name, call.arguments)
        ]


def test_a_tool_that_cannot_be_enforced_is_refused_by_name(url: str):
    from openai import BadRequestError, OpenAI

    llm = OpenAI(base_url=url, api_key="EMPTY", max_retries=0)
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    function = {"name": "get", "parameters": parameters}
    words = "tool 'get' cannot be enforced by a grammar: it uses 'uniqueItems'"
    messages: Any = REQUESTS[0]
    chat_tools: Any = [{"type": "function", "function": function}]
    response_tools: Any = [{"type": "function", "strict": None, **function}]
    with pytest.raises(BadRequestError, match=words):
        llm.chat.completions.create(model="tiny", messages=messages, tools=chat_tools, tool_choice="required")
    with pytest.raises(BadRequestError, match=words):
        llm.responses.create(model="tiny", input="x", tools=response_tools, tool_choice="required")


def test_calls_with_tool_choice_auto_go_through_the_parser(url: str):
    """The output is constrained to calls by the response format."""
    from serving.constraint import calls_schema

    forced = {"type": "json_schema", "json_schema": {"name": "calls", "schema": calls_schema(TOOLS, at_most=2)}}
    calls, ended = both(url, response_format=forced)
    assert valid(calls)
    assert ended == "tool_calls"
    llm = xLAMChatCompletion(url, "tiny", max_tokens=200)
    ours = llm.completion(REQUESTS[0], TOOLS, response_format=forced)["choices"][0]["message"]["tool_calls"]
    assert [(call["name"], call["arguments"]) for call in ours] == calls
    cut, ended = both(url, response_format=forced, max_tokens=12)
    assert (cut, ended) == ([], "length"), "truncated calls are content"


def test_requests_that_the_server_refuses(url: str):
    llm = xLAMChatCompletion(url, "tiny")
    with pytest.raises(ServerError, match="shorten the conversation") as error:
        llm.completion([{"role": "user", "content": "word " * 5000}])
    assert error.value.status == 400
    with pytest.raises(ServerError, match="404"):
        xLAMChatCompletion(url, "other").completion(REQUESTS[0])
    assert llm.models() == ["tiny"]


def test_behind_fastchat(url: str, mixtral: Path, with_torch: dict[str, str], tmp_path: Path):
    """Runs the three commands of docs/serving.md: FastChat's server returns vLLM's answers, streamed or not."""
    [exported] = mixtral.glob("served-*")
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("## Behind FastChat")[2]
    ports = {documented: str(free_port()) for documented in ("31004", "31005", "8000")}
    commands = re.findall("^(\\S*python) (-m .*)$", page, re.MULTILINE)[:3]
    for documented, port in ports.items():
        commands = [(python, command.replace(documented, port)) for python, command in commands]
    commands = [(sys.executable if python == "python" else str(ROOT / python), command) for python, command in commands]
    with ExitStack() as stack:
        for python, command in commands:
            words = [python, *(str(exported) if word == "exported" else word for word in command.split())]
            process = subprocess.Popen(
                words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                env=with_torch | {"LOGDIR": str(tmp_path)},
            )  # fmt: skip
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            assert process.stdout
            stack.enter_context(process.stdout)
            if "serving" in command:
                assert process.stdout.readline().startswith("ready: ")
            else:
                answers_soon(int(command.partition("--port ")[2].split()[0]))
        through = xLAMChatCompletion(f"http://localhost:{ports['8000']}/v1", exported.name, max_tokens=24)
        direct = xLAMChatCompletion(url, "tiny", max_tokens=24)
        assert through.models() == [exported.name]
        system = {"role": "system", "content": "Be brief."}
        for messages in (*REQUESTS, [system, *REQUESTS[0]], [*REQUESTS[0], {"role": "assistant", "content": "No."},
                                                             *REQUESTS[1]]):  # fmt: skip
            expected = direct.completion(messages)["choices"][0]
            answer = through.completion(messages)
            assert answer["choices"][0]["message"] == expected["message"]
            assert answer["usage"]["completion_tokens"] <= 24
            *pieces, streamed = through.stream(messages)
            # FastChat drops incomplete characters, which a random model writes
            assert "".join(map(str, pieces)) == expected["message"]["content"].replace("\ufffd", "")
            assert isinstance(streamed, dict)
        v1 = [xLAMChatCompletion(llm.config.base_url, llm.config.model, format="xlam_v1", max_tokens=24,
                                 bad_output="mark") for llm in (through, direct)]  # fmt: skip
        fastchat_message, vllm_message = (llm.completion(REQUESTS[0], TOOLS)["choices"][0]["message"] for llm in v1)
        assert fastchat_message == vllm_message
        with pytest.raises(ServerError, match="maximum context length"):
            through.completion([{"role": "user", "content": "word " * 5000}])


def answers_soon(port: int) -> None:
    """Waits until a server listens on the port."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")


@pytest.fixture(scope="module")
def quickstart(
    commands: Commands, with_torch: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The model of `make quickstart`, trained here unless a run exists, and the URL of its server."""
    model = ROOT / "runs/quickstart/hf"
    if not model.is_dir():
        run = tmp_path_factory.mktemp("quickstart")
        model = run / "hf"
        commands.run("xlam_jax.train", "--config", "configs/quickstart.yaml", f"output_dir={run}/run", limit=2400)
        commands.run("converters.orbax_to_hf", "--checkpoint", run / "run", "--out", model)
    with served(with_torch, "--model", model, "--served-model-name", "quickstart") as url:
        yield model, url


def test_the_model_of_the_quickstart_answers_its_requests_alike(quickstart: tuple[Path, str]):
    """JAX and vLLM answer the ten requests of `make quickstart` alike."""
    from examples.quickstart.show import question, requests
    from xlam_jax import config as configs
    from xlam_jax.data.render import render_prompt
    from xlam_jax.generate import complete, find_model

    model, url = quickstart
    samples = requests(configs.load(ROOT / "configs/quickstart.yaml"), 10)
    checkpoint = find_model(model)
    prompts = [render_prompt(question(sample), sample.tools, checkpoint.tokenizer) for sample in samples]
    ours = complete(checkpoint.load(), checkpoint.tokenizer, prompts, stops=checkpoint.stops, max_new_tokens=160)
    llm = xLAMChatCompletion(url, "quickstart", bad_output="mark", max_tokens=160)
    served = [llm.completion(question(sample), sample.tools)["choices"][0]["message"] for sample in samples]
    calls = [
        [{"name": call["name"], "arguments": call["arguments"]} for call in message["tool_calls"]] for message in served
    ]
    assert calls == [answer["tool_calls"] for answer in ours]
    assert sum(map(bool, calls)) >= 8


def test_every_agent_runs_with_the_model_of_the_quickstart(
    commands: Commands, quickstart: tuple[Path, str], tmp_path: Path
):
    """HotpotQA and WebShop run without an error; the model is far too small to answer correctly."""
    corpus = small_corpus.write(tmp_path)
    options = ["--base-url", quickstart[1], "--model", "quickstart", "--max-tokens", 60, "--limit", 3]
    with shop.serve() as address:
        suites = {
            "hotpotqa": ["--data", corpus / "questions.jsonl", "--set", f"corpus={corpus / 'pages.jsonl'}"],
            "webshop": ["--set", f"url={address}"],
        }
        for agent in agents.names():
            for suite, suite_options in suites.items():
                out = tmp_path / suite / agent
                command = ["--suite", suite, "--agent", agent, "--out", out]
                command += [*options, *suite_options, "--set", "max_steps=3"]
                commands.call("xlam_jax.evaluate", *command)
                summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
                assert (summary["scored"], summary["errors"]) == (3, {})


def test_an_adapter_is_served_by_name(commands: Commands, with_torch: dict[str, str], tmp_path: Path):
    config = json.loads((ROOT / "configs/models/tiny_mixtral.json").read_text(encoding="utf-8"))
    for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"):
        del config[key]
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "mistral.json").write_text(json.dumps(config))
    mistral = (*QUICKSTART, f"model.config={tmp_path}/mistral.json", "train.steps=30")
    commands.run("xlam_jax.train", *mistral, f"output_dir={tmp_path}/base-run")
    commands.run("converters.orbax_to_hf", "--checkpoint", tmp_path / "base-run", "--out", tmp_path / "base")
    commands.run(
        "xlam_jax.train", *mistral, f"output_dir={tmp_path}/run", f"model.init_from={tmp_path}/base",
        "train.trainable=lora", "train.learning_rate=2e-2",
    )  # fmt: skip
    commands.run(
        "converters.orbax_to_hf", "--checkpoint", tmp_path / "run", "--out", tmp_path / "mine", "--lora", "adapter"
    )
    commands.run("converters.orbax_to_hf", "--checkpoint", tmp_path / "run", "--out", tmp_path / "merged")
    base = generated(commands, tmp_path / "base", tmp_path)
    merged = generated(commands, tmp_path / "merged", tmp_path)
    assert base != merged
    with served(with_torch, "--model", tmp_path / "base", "--lora", f"mine={tmp_path}/mine") as url:
        assert answered(url, "base") == base
        assert answered(url, "mine") == merged
