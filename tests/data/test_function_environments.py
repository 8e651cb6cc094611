"""The importers of logs whose agents call functions: τ-bench, ToolAlpaca and API-Bank."""

import json

import pytest
from conversions import run, turns
from environment_logs import FIXTURES, files, names

from xlam_jax.errors import UserError


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
