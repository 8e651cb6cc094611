"""Held-out trajectories, teacher-forced: each recorded conversation up to a turn that calls tools, and the model's
calls beside those recorded. Scored as a run scores its own held-out requests (`xlam_jax.evaluate.next_call`)."""

from typing import ClassVar

from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.endpoint import Model
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task, setting
from xlam_jax.evaluate.suites._rows import wanted


class Trajectories(Suite):
    """`exact`: the same calls; `right_function`: the same functions; `schema_valid`; `parsable`: there is a call."""

    name = "trajectories"
    about = "the next call in held-out trajectories of your own (--data FILE.jsonl, unified), teacher-forced"
    settings: ClassVar = {
        "turns": "`one` turn of each trajectory (the default, as in a training run), or `all` that call tools"
    }
    main_score = "exact"

    def __init__(self, options: Options):
        super().__init__(options)
        self._path = wanted(self.name, options.data, "a JSONL file of unified trajectories")
        self._turns = setting(options, "turns", str, "one")
        if self._turns not in ("one", "all"):
            raise UserError(f"--set turns={self._turns}: is neither `one` nor `all`")

    def tasks(self) -> list[Task]:
        """Raises `UserError` for a row that is no trajectory, and where none calls a tool."""
        from xlam_jax.evaluate import next_call

        samples = []
        for number, trajectory in read_jsonl(self._path):
            if isinstance(trajectory, InvalidTrajectory):
                raise UserError(
                    f"{self._path}:{number}: {trajectory}; `python -m xlam_jax.data validate` checks the file, and "
                    "`python -m converters.trajectories` writes it from other formats"
                )
            samples.append((trajectory.source or "", trajectory))
        if self._turns == "one":
            requests = list(next_call.requests(samples))
        else:
            requests = [
                next_call.request(source, one, turn) for source, one in samples for turn in next_call.turns(one)
            ]
        if not requests:
            raise UserError(f"{self._path}: no turn of its {len(samples)} trajectories calls a tool; give others")
        names = [f"{one.source}/{one.id}/{one.turn}" for one in requests]
        if len(set(names)) < len(names):
            twice = next(name for at, name in enumerate(names) if name in names[:at])
            raise UserError(f"{self._path}: two trajectories have the id {twice.rsplit('/', 1)[0]}; ids are unique")
        return [Task(name, one, one.source) for name, one in zip(names, requests, strict=True)]

    async def run(self, task: Task, model: Model, agent: Agent) -> Outcome:
        """One request."""
        from xlam_jax.evaluate import next_call

        request = task.data
        answer = await model.chat(request.messages, request.tools)
        score = next_call.score(request, answer.calls)
        failure = ""
        if not score.exact:
            failure = (
                "no-call"
                if not score.parsable
                else "wrong-function"
                if not score.right_function
                else "wrong-arguments"
                if score.schema_valid
                else "invalid-arguments"
            )
        scores = {name: float(value) for name, value in score._asdict().items()}
        expected = [{"name": call.name, "arguments": call.arguments} for call in request.expected]
        return Outcome(scores, [*answer.asked, answer.message], failure, {"expected": expected})
