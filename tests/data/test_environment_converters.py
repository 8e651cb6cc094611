"""The importers of environments' logs: ALFWorld, InterCode, τ-bench, ToolAlpaca and API-Bank."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from xlam_jax.data.converters import CONVERTERS
from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.errors import UserError

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
    return [FIXTURES / name / file for file in FILES[name]]


def run(name: str, *paths: Path) -> tuple[list[Trajectory], list[tuple], Counter]:
    """Returns (trajectories, (unit, row, reason) of dropped ones, number of repairs by reason)."""
    items = list(CONVERTERS[name](list(paths)))
    kept = [item for item in items if isinstance(item, Converted)]
    dropped = [(item.unit, item.row, item.reason) for item in items if isinstance(item, Dropped)]
    return (
        [item.trajectory for item in kept],
        dropped,
        Counter(repair.reason for item in kept for repair in item.repairs),
    )


def turns(trajectory: Trajectory) -> list[tuple]:
    """Returns (role, text) of each turn, and of assistant turns also the calls."""
    return [
        (m.role, m.content, *((call.name, call.arguments) for call in m.tool_calls)) for m in trajectory.conversation
    ]


def names(trajectory: Trajectory) -> list[str]:
    return [tool["function"]["name"] for tool in trajectory.tools]


@pytest.mark.parametrize("name", FILES)
def test_calls_fit_their_tools(name):
    kept, _, _ = run(name, *files(name))
    assert len({trajectory.id for trajectory in kept}) == len(kept)
    misfits: Counter[str] = Counter()
    for trajectory in kept:
        assert trajectory.source == name
        assert trajectory.task_instruction
        assert parse_trajectory(to_dict(trajectory)) == trajectory
        assert trajectory.conversation[-1].role == "assistant"
        results = [m.tool_call_id for m in trajectory.conversation if m.role == "tool"]
        assert len(set(results)) == len(results)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in trajectory.tools}
        for schema in schemas.values():
            Draft202012Validator.check_schema(schema)
        for message in trajectory.conversation:
            for call in message.tool_calls:
                strict = Draft202012Validator(schemas[call.name] | {"additionalProperties": False})
                misfits[call.name] += not strict.is_valid(call.arguments)
    in_the_source = {"toolalpaca": {"searchAnime": 1}, "api_bank": {"AddMeeting": 1, "CancelTimedSwitch": 1}}
    assert +misfits == in_the_source.get(name, {})


def test_alfworld():
    kept, dropped, repaired = run("alfworld", *files("alfworld"))
    solved, imagined, untagged, cut, joined = kept
    assert dropped == [("step", 2, "invalid-action")]
    assert repaired == {"ignored-code": 3, "joined-blocks": 1, "text-after-action": 2}
    assert [t.score for t in kept] == [1.0, 0.0, 0.0, 1.0, 0.0]
    task = "alfworld_pick_and_place_simple-SaltShaker-None-Drawer-10/trial_T20190909_021613_077537"
    assert solved.id == f"{task}_mint_gpt-4-0613_1"
    assert solved.task_instruction.endswith("You can only propose a solution 2 times.")
    execute, solution = solved.tools
    assert execute["function"]["description"].endswith(
        "look() -> str\nLook around. It will return what you see in the room.\nFor example: look()"
    )
    assert solution["function"]["parameters"]["required"] == ["answer"]
    assert turns(solved)[0][1].endswith("Your task is to: put a saltshaker in drawer.")
    assert "Example" not in str(turns(solved))
    assert turns(solved)[3:] == [
        (
            "assistant",
            "I am now at cabinet 2 where I found a saltshaker 1. Next, I need to take it and put it in a drawer. "
            "I can put it in any drawer (1-3).",
            (
                "execute",
                {
                    "code": 'print(take_from("saltshaker 1", "cabinet 2"))\nprint(goto("drawer 1"))\n'
                    'print(put("saltshaker 1", "drawer 1"))'
                },
            ),
        ),
        (
            "tool",
            "You pick up the saltshaker 1 from the cabinet 2.\nThe drawer 1 is closed.\nNothing happens.\n"
            "You have 3 steps left and 2 chances to propose solution left.",
        ),
        (
            "assistant",
            "The drawer 1 is closed. I need to open it before I can put the saltshaker 1 in it.",
            ("execute", {"code": 'print(open_receptacle("drawer 1"))\nprint(put("saltshaker 1", "drawer 1"))'}),
        ),
    ]
    assert imagined.conversation[1].loss is False  # after its code it imagines the environment's answers and solves
    assert turns(imagined)[1][2] == ("solution", {"answer": "done"})
    assert turns(imagined)[2][1].startswith("Your answer is wrong.")
    assert [m.loss for m in imagined.conversation[2:]] == [None] * (len(imagined.conversation) - 2)
    assert turns(untagged)[5][1] == "I apologize for the mistake. Here is the correct command:"
    assert turns(cut)[2][0] == "tool"  # the step after it was cut off in its thought
    assert turns(cut)[3][:2] == ("assistant", "")
    code = turns(joined)[1][2][1]["code"]
    assert code.startswith("for loc_to_check in")
    assert code.endswith('        break\nprint(take_from("peppershaker 1", loc_to_check))\nprint(goto("drawer 1"))\n'
                         'print(put("peppershaker 1", "drawer 1"))')  # fmt: skip
    assert "<" not in "".join(m.content for t in kept for m in t.conversation if m.role == "assistant")


def mint(*texts: str) -> dict:
    """An episode with these turns of the agent, each answered with "seen"."""
    rules = "Rules.\n\nTool function available (imported):\n[1] goto(x)\n\n---\n\nTask:\nExample\n\n---\n\nTask:\nT\n"
    history = [{"role": "user", "content": rules}]
    for text in texts:
        history += [{"role": "assistant", "content": text}, {"role": "user", "content": "Observation:\nseen"}]
    return {"state": {"history": history, "success": False}, "task": {"prompt": "T"}}


@pytest.mark.parametrize(
    ("text", "expected", "loss", "reasons"),
    [
        ("<execute> a </execute>", ("", ("execute", {"code": "a"})), None, []),
        ("Assistant:\nAssistant：\n<thought> t </thought> <execute>a</execute> Assistant<|im_sep|>",
         ("t", ("execute", {"code": "a"})), None, []),
        ("t<execute>a</execute><solution> c </solution>",
         ("t", ("solution", {"answer": "c"})), False, ["ignored-code"]),
        ("<execute>a<solution>b</solution></execute>", ("", ("solution", {"answer": "b"})), False, ["ignored-code"]),
        ("<solution>a</solution><thought>t</thought><solution>b</solution>",
         ("", ("solution", {"answer": "a\nb"})), None, ["joined-blocks", "text-after-action"]),
        ("<execute>a</execute>\n<execute>b</execute>", ("", ("execute", {"code": "a\nb"})), None, ["joined-blocks"]),
        ("<execute>a</execute> and so on", ("", ("execute", {"code": "a"})), None, ["text-after-action"]),
    ],
)  # fmt: skip
def test_alfworld_reads_a_turn_like_the_environment(text, expected, loss, reasons, write_jsonl):
    (trajectory,), dropped, repaired = run("alfworld", write_jsonl(mint(text)))
    assert dropped == []
    assert turns(trajectory)[1:] == [("assistant", *expected)]
    assert trajectory.conversation[1].loss is loss
    assert list(repaired) == reasons


@pytest.mark.parametrize("text", ["<thought>t</thought>", "<execute> </execute>", "<execute>a</execute><solution>", ""])
def test_alfworld_drops_what_the_environment_did_not_understand(text, write_jsonl):
    path = write_jsonl(mint(text), mint("<execute>a</execute>", text, "<solution>b</solution>"))
    (trajectory,), dropped, _ = run("alfworld", path)
    assert dropped == [("trajectory", 1, "no-assistant-turn"), ("step", 2, "invalid-action")]
    assert [m.tool_call_id for m in trajectory.conversation if m.role == "tool"] == ["call_1"]
    assert [call.id for m in trajectory.conversation for call in m.tool_calls] == ["call_1", "call_2"]


def test_alfworld_reads_long_turns_in_linear_time(write_jsonl):
    hostile = ["<execute>" * 300_000, "<execute>" * 300_000 + "</execute>", " " * 3_000_000 + "<execute>a</execute>"]
    kept, dropped, _ = run("alfworld", write_jsonl(*(mint(text) for text in hostile)))
    assert (len(kept), len(dropped)) == (2, 1)


def test_intercode():
    kept, dropped, repaired = run("intercode", *files("intercode"))
    solved, failed, misspelt, answered = kept
    assert (dropped, repaired) == ([], {"submit-as-query": 1})
    assert [(t.id, t.score) for t in kept] == [
        ("intercode_ic_bash_1", 1.0),
        ("intercode_ic_bash_2", 0.39),
        ("intercode_ic_sql_1", 1.0),
        ("intercode_ic_sql_2", 1.0),
    ]
    assert (names(solved), names(answered)) == (["bash", "submit"], ["sql", "submit"])
    find = 'find /testbed -type f -name "*.java" -exec md5sum {} + | sort | uniq '
    assert turns(solved) == [
        ("user", 'Calculate a list of duplicate md5 sum hashes for all the ".java" files in the /testbed directory'),
        ("assistant", "", ("bash", {"command": f"{find}-d -w 32"})),
        ("tool", "f32a3a97638afeb2ee2a15cfe335ab72  /testbed/Hello.java\n"),
        ("assistant", "", ("bash", {"command": f"{find}-D -w 32"})),
        (
            "tool",
            "".join(
                f"f32a3a97638afeb2ee2a15cfe335ab72  /testbed/{file}.java\n"
                for file in ("Hello", "Hello1", "dir1/AnotherHello")
            ),
        ),
        ("assistant", "", ("bash", {"command": f"{find}-D -w 32 | awk '{{print $1}}' | uniq"})),
        ("tool", "f32a3a97638afeb2ee2a15cfe335ab72\n"),
        ("assistant", "", ("submit", {})),
    ]
    assert {call.name for m in failed.conversation for call in m.tool_calls} == {"bash"}  # the turns ran out
    without_loss = [m for m in misspelt.conversation if m.loss is False]
    assert [call.arguments for m in without_loss for call in m.tool_calls] == [{"query": "submit;"}]
    assert turns(answered)[-3:] == [
        ("assistant", "",
         ("sql", {"query": 'select document_name, template_id from Documents where Document_Description like "%w%";'})),
        ("tool", "('Data base', 11)('How to read a book', 4)"),
        ("assistant", "", ("submit", {})),
    ]  # fmt: skip


def episode(*steps: tuple[str, str], thoughts: list[str] | None = None, rewards: tuple = (0, 1)) -> dict:
    history: dict = {"actions": [a for a, _ in steps], "observations": [o for _, o in steps], "rewards": list(rewards)}
    if thoughts is not None:
        history["thoughts"] = thoughts
    return {"environment": "ic_sql", "query": "Q", "turn_history": history}


def test_intercode_react(write_jsonl):
    path = write_jsonl(
        episode(
            ("execute[SELECT a[1]]", "[(1,)]"),
            ("Is it 1?", "Error executing query: Your last `execute` action did not contain sql code"),
            ("submit", "[(1,)]"),
            thoughts=["I look.", "I ask.", "It is 1."],
        ),
        episode(("execute[SELECT 1]", "1"), ("submit", "1"), thoughts=["t", "EXCEEDED MAX TURNS: submit"]),
        episode(("SHOW TABLES", "t"), ("I can't", "No SQL code was found in your last response."), rewards=(0.5, 0)),
        episode(("blocked", "")),
    )
    (searched, stopped, prose), dropped, _ = run("intercode", path)
    assert turns(searched)[1:] == [
        ("assistant", "I look.", ("sql", {"query": "SELECT a[1]"})),
        ("tool", "[(1,)]"),
        ("assistant", "It is 1.", ("submit", {})),
    ]
    assert turns(stopped)[1:] == [("assistant", "t", ("sql", {"query": "SELECT 1"}))]
    assert turns(prose)[1:] == [("assistant", "", ("sql", {"query": "SHOW TABLES"}))]
    assert (searched.score, stopped.score, prose.score) == (1.0, 1.0, 0.5)
    assert dropped == [("step", 1, "no-code"), ("step", 3, "no-code"), ("trajectory", 4, "no-assistant-turn")]


def test_intercode_names_what_it_can_not_read(write_jsonl):
    refused = episode(("SELECT 1", "1"), ("blocked", ""))
    refused["turn_history"]["observations"].pop()  # none was logged
    uneven = episode(("SELECT 1", "1"), ("SELECT 2", "2"))
    uneven["turn_history"]["observations"].pop()
    kept, dropped, _ = run("intercode", write_jsonl(refused, uneven, episode(("a", "b")) | {"environment": "ic_ctf"}))
    assert len(kept) == 1
    assert dropped == [
        ("step", 1, "no-code"),
        ("trajectory", 2, "uneven-lists"),
        ("trajectory", 3, "unknown-environment"),
    ]


def test_tau_bench():
    kept, dropped, repaired = run("tau_bench", *files("tau_bench"))
    failed, solved = kept
    assert (dropped, repaired) == ([], {"string-arguments": 5, "null-content": 5})
    assert [(t.id, t.score) for t in kept] == [("tau_bench_airline_1_0", 0.0), ("tau_bench_airline_1_1", 1.0)]
    assert failed.task_instruction == solved.task_instruction
    assert solved.task_instruction.startswith("# Airline Agent Policy\n\nThe current time is 2024-05-15 15:00:00 EST.")
    assert failed.tools == solved.tools == json.loads((FIXTURES / "tau_bench" / "airline_tools.json").read_text())
    assert turns(solved)[0] == ("user", "Hi! I need to change my return flight from Texas to Newark.")
    assert turns(solved)[3] == ("assistant", "", ("get_user_details", {"user_id": "olivia_gonzalez_2305"}))
    assert turns(solved)[4][1].startswith('{"name": {"first_name": "Olivia"')
    assert turns(solved)[-1][1].startswith("Your reservation with ID **Z7GOZK** has been successfully cancelled")
    assert "###STOP###" not in str(kept)


def test_tau_bench_finds_its_tools(tmp_path):
    (rows,) = files("tau_bench")
    kept, *_ = run("tau_bench", rows)
    tools = FIXTURES / "tau_bench" / "airline_tools.json"
    elsewhere = tmp_path / "run.json"
    elsewhere.write_bytes(rows.read_bytes())
    assert run("tau_bench", tools, elsewhere)[0] == kept  # the only file of tools
    with pytest.raises(UserError, match=r"run\.json: its tools .* found: none; give that file too"):
        run("tau_bench", elsewhere)
    retail = tmp_path / "retail_tools.json"
    retail.write_text("[]")
    with pytest.raises(UserError, match=r"run\.json: its tools .*, found: .*airline_tools\.json, .*retail_tools\.json"):
        run("tau_bench", elsewhere, tools, retail)
    assert run("tau_bench", rows, retail, tools)[0] == kept  # chosen by the domain in the name
    retail.write_text('[{"type": "function"}]')
    with pytest.raises(UserError, match=r"retail_tools\.json:1: invalid tool: tool-without-name"):
        run("tau_bench", elsewhere, retail)


def test_toolalpaca_golden_answers():
    kept, dropped, repaired = run("toolalpaca", *files("toolalpaca"))
    assert dropped == [
        ("step", 2, "placeholder-argument"),
        ("step", 3, "after-missing-result"),
        ("trajectory", 3, "placeholder-argument"),
        ("step", 4, "optional-step"),
        ("step", 5, "placeholder-argument"),
    ]
    assert repaired == {"empty-option": 4}
    assert [t.id.removeprefix("toolalpaca_eval_simulated_") for t in kept] == [
        "1_0", "1_1", "1_2", "2_0", "2_1", "2_2", "3_0", "4_0", "5_0",
    ]  # fmt: skip
    assert turns(kept[1]) == [
        (
            "user",
            "I'm looking for an axolotl that is wild in color and medium in size. Can you help me find some pictures?",
        ),
        ("assistant", "", ("searchAxolotlImages", {"color": "wild", "size": "medium", "page": 1})),
    ]
    assert [call.arguments["size"] for call in kept[2].conversation[1].tool_calls] == ["small", "medium", "large"]
    assert turns(kept[3])[1:] == [("assistant", "", ("searchAnime", {"query": "Attack on Titan"}))]
    assert turns(kept[6])[1][2] == ("getDetails", {"Question": "Can you tell me the abusive IP address?"})
    search = next(tool["function"] for tool in kept[0].tools if tool["function"]["name"] == "searchAxolotlImages")
    assert (
        search["description"] == "Search for axolotl images based on specific criteria such as color, gender, and size."
    )
    assert search["parameters"]["properties"]["color"] == {
        "type": "string",
        "description": "The color of the axolotl (e.g., 'wild', 'leucistic', 'albino', etc.)",
        "enum": ["wild", "leucistic", "albino"],
    }
    assert search["parameters"]["required"] == []
    dashboard = kept[8].tools[1]["function"]["parameters"]["properties"]  # its body is a reference
    assert dashboard["charts"] == {
        "type": "array",
        "description": "A list of charts to be included in the dashboard initially",
        "items": {"type": "string"},
    }


def api(**changes: object) -> dict:
    """An API with a function `pay` and training instances."""
    operation = {
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}}, {"name": 1}],
        "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Order"}}}},
    }
    order = {
        "type": "object",
        "properties": {
            "amount": {"type": "number"},
            "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Order"}},
            "when": {"type": "timestamp", "format": "date"},
        },
        "required": ["amount", "unknown", []],
    }
    document = {"paths": {"/pay": {"post": operation}}, "components": {"schemas": {"Order": order}}}
    row: dict = {
        "Name": "Pay",
        "Documentation": json.dumps(document),
        "Function_Description": {"pay": 'Pay an order.\nParameters: {"id": "…"}', "components": ""},
        "Function_Projection": {"pay": ["/pay", "post"]},
    }
    return row | changes


def step(action: str, text: str, log: str, observation: object = "ok") -> list:
    return [[action, text, log], observation]


def test_toolalpaca_instances(write_jsonl):
    row = api(
        Instances=[
            {
                "input": "Pay it.\nHint: which one?",
                "output": "Paid.",
                "Final Thought": "I can answer.",
                "intermediate_steps": [
                    step("getDetails", '{"Question": "Which?"}',
                         ' I ask. Action: none yet.\nAction: getDetails\nAction Input: {"Question": "Which?"}', "7"),
                    step("refund", "{}", "No.\nAction: refund\nAction Input: {}", "`refund` is not a valid action."),
                    step("pay", "{id: 7}", "Now.\nAction: pay\nAction Input: {id: 7}", "Invalid JSON format."),
                    step("pay", '{"id": "7", "amount": "2.50"}\nObservation',
                         "Thought: Again.\nASSISTANT Action: pay\nASSISTANT Action Input: {}", {"paid": True}),
                ],
            },
            {"input": "Pay 8.", "output": "Agent stopped due to iteration limit or time limit.",
             "intermediate_steps": [step("pay", '{"id": 8}', "Action: pay\nAction Input: {}")]},
            {"input": "Hi", "output": "Hello.", "intermediate_steps": []},
            {"input": "Hi", "output": "Hello.", "intermediate_steps": [["pay", "{}"]]},
            "an error",
        ]
    )  # fmt: skip
    (paid, stopped), dropped, repaired = run("toolalpaca", write_jsonl(row))
    assert turns(paid) == [
        ("user", "Pay it."),
        ("assistant", "I ask. Action: none yet.", ("getDetails", {"Question": "Which?"})),
        ("tool", "7"),
        ("assistant", "Again.", ("pay", {"id": 7, "amount": 2.5})),
        ("tool", '{"paid": true}'),
        ("assistant", "Paid."),
    ]
    assert turns(stopped) == [("user", "Pay 8."), ("assistant", "", ("pay", {"id": 8}))]
    assert dropped == [
        ("step", 1, "unknown-action"),
        ("step", 1, "bad-arguments"),
        ("step", 1, "no-answer"),
        ("trajectory", 1, "no-tool-call"),
        ("trajectory", 1, "bad-step"),
        ("trajectory", 1, "missing-field"),
    ]
    assert repaired == {"trailing-text-after-json": 1, "text-for-declared-type": 2, "structured-content": 1}
    pay = paid.tools[1]["function"]
    assert (pay["name"], pay["description"]) == ("pay", "Pay an order.")
    assert pay["parameters"] == {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "amount": {"type": "number"},
            "parts": {"type": "array", "items": {}},  # an order inside an order
            "when": {"format": "date"},  # of a type that JSON Schema does not know
        },
        "required": ["id", "amount"],
    }


def test_toolalpaca_names_what_it_can_not_read(write_jsonl):
    golden = {"Instructions": ["Pay."], "Golden_Answers": [[{"Action": "refund", "Action_Input": "{}"}]]}
    path = write_jsonl(
        api(),
        api(Documentation="{"),
        api(**golden),
        api(**golden | {"Instructions": []}),
        api(**golden | {"Golden_Answers": [[]]}),
        api(Function_Projection={"pay": ["/pay", "get"]}),
    )
    kept, dropped, _ = run("toolalpaca", path)
    assert kept == []
    assert [(row, reason) for _, row, reason in dropped] == [
        (1, "missing-field"),
        (2, "malformed-json"),
        (3, "undeclared-tool"),
        (4, "uneven-lists"),
        (5, "no-tool-call"),
        (6, "missing-field"),
    ]


def test_toolalpaca_references_do_not_multiply_without_end(write_jsonl):
    levels = {
        f"L{i}": {
            "type": "object",
            "properties": {f"p{j}": {"$ref": f"#/components/schemas/L{i + 1}"} for j in range(9)},
        }
        for i in range(15)
    }
    document = json.loads(api()["Documentation"])
    document["components"]["schemas"] = levels | {"Order": {"$ref": "#/components/schemas/L0"}}
    instance = {"input": "Pay.", "output": "Done.", "intermediate_steps": [step("pay", '{"id": 1}', "Action: pay")]}
    (trajectory,), _, _ = run("toolalpaca", write_jsonl(api(Documentation=json.dumps(document), Instances=[instance])))
    assert len(json.dumps(trajectory.tools)) < 1_000_000


def test_api_bank():
    kept, dropped, repaired = run("api_bank", *files("api_bank"))
    meeting, hotel, switch, deleted, reset, several = kept
    assert dropped == [("trajectory", 7, "call-in-text"), ("trajectory", 8, "no-conversation")]
    assert repaired == {"text-for-declared-type": 6, "consecutive-turns": 1}
    assert meeting.id == "api_bank_AddAgenda-AddMeeting-GetUserToken-level-2-3"
    assert names(meeting) == ["AddAgenda", "AddMeeting", "GetUserToken"]  # the first is not called
    assert turns(meeting)[3:7] == [
        ("assistant", "", ("GetUserToken", {"username": "JohnDoe", "password": "pass123"})),
        ("tool", '{"token": "a9s8d7f6g5h4j3k2l1"}'),
        (
            "assistant",
            "",
            (
                "AddMeeting",
                {
                    "token": "a9s8d7f6g5h4j3k2l1",
                    "meeting_topic": "new project launch",
                    "start_time": "2023-11-12 15:00:00",
                    "end_time": "2023-11-12 16:00:00",
                    "location": "conference room",
                    "attendees": ["John", "Jane"],
                },
            ),
        ),
        ("tool", "success"),
    ]
    said, booked = turns(hotel)[9][1:]
    assert said == "Alright, let me check for availability."
    assert booked[1]["room_count"] == 1  # written "1", declared int
    attendees = meeting.tools[1]["function"]["parameters"]["properties"]["attendees"]
    assert (attendees["type"], attendees["items"]) == ("array", {"type": "string"})
    assert turns(switch)[1][2][1] == {"device_id": "10000025", "time": "2023-03-19 09:30:00"}  # declared is `name`
    assert turns(deleted)[-1][2][0] == "DeleteAccount"  # the user's thanks are dropped
    assert reset.tools[0]["function"]["parameters"]["required"] == ["status"]
    assert turns(reset)[9][2][1]["verification_code"] == 970420
    assert ("assistant", "Okay, to delete your account, I need your token.\nBut, I see that") in [
        (turn[0], turn[1][:64]) for turn in turns(several)
    ]


def test_api_bank_keeps_exceptions_and_names_what_it_can_not_read(write_jsonl):
    def dialogue(name: str, result: object, role: str = "API") -> dict:
        call = {"role": role, "api_name": name, "param_dict": {"username": "a", "password": "b"}, "result": result}
        return {"turns": [{"role": "User", "text": "Log in."}, call, {"role": "AI", "text": "There."}]}

    path = write_jsonl(
        dialogue("GetUserToken", {"output": None, "exception": "no such user"}),
        dialogue("Nothing", {}),
        dialogue("GetUserToken", {}, role="Api"),
        dialogue("GetUserToken", "x"),
    )
    (trajectory,), dropped, _ = run("api_bank", path, FIXTURES / "api_bank" / "apis.json")
    assert trajectory.id == "api_bank_rows_1"
    assert turns(trajectory)[2] == ("tool", '{"exception": "no such user", "output": null}')
    assert [reason for *_, reason in dropped] == ["undeclared-tool", "unknown-role", "missing-field"]
    with pytest.raises(UserError, match=r"apis\.json: not found"):
        run("api_bank", path)
    pool = path.with_name("apis.json")
    pool.write_text('{"A": {"description": "d", "input_parameters": {"x": {}}}}')
    with pytest.raises(UserError, match=r"apis\.json: missing-field: `description` is missing"):
        run("api_bank", path)


@pytest.mark.parametrize("name", FILES)
def test_bad_rows_are_named(name, write_jsonl):
    path = write_jsonl(b"{", [], {}, {"state": 1, "environment": 1, "traj": [1], "Documentation": 1, "turns": [1]})
    kept, dropped, _ = run(name, path, *([FIXTURES / name / TOOLS[name]] if name in TOOLS else []))
    assert kept == []
    assert [row for _, row, _ in dropped] == [1, 2, 3, 4]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Returns the path to everything in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*at, key), *places(inner, (*at, key))]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_is_converted_or_named(name, folder, data):
    rows = [row for path in files(name) for row in load(path)]
    row = copy.deepcopy(data.draw(st.sampled_from(rows)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(row)))
        holder = row
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = data.draw(JSON)
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    items = list(CONVERTERS[name]([path, *([FIXTURES / name / TOOLS[name]] if name in TOOLS else [])]))
    assert any(isinstance(item, Converted) or item.unit == "trajectory" for item in items)
    for item in items:
        if isinstance(item, Converted):
            assert parse_trajectory(to_dict(item.trajectory)) == item.trajectory


def load(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    document = json.loads(path.read_text())
    return list(document.values()) if isinstance(document, dict) else document
