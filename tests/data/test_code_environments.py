"""The importers of logs whose agents act by code and commands: ALFWorld and InterCode."""

import pytest
from conversions import run, turns
from environment_logs import files, names


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
