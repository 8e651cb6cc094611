"""Held-out trajectories, teacher-forced: the model answers each recorded conversation up to a turn with tool calls, and
its calls are compared with the recorded ones. Scores are those of a training run's held-out requests
(`xlam_jax.evaluate.next_call`)."""

from typing import ClassVar

from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.endpoint import Model
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task, setting
from xlam_jax.evaluate.suites._rows import check_data


class Trajectories(Suite):
    """The scores are the fields of `next_call.Score`."""

    name = "trajectories"
    about = "the next call in your held-out trajectories (--data FILE.jsonl, unified format), teacher-forced"
    settings: ClassVar = {
        "turns": "`one` turn of each trajectory (the default, as in training), or `all` turns that call tools"
    }
    main_score = "exact"

    def __init__(self, options: Options):
        super().__init__(options)
        self._path = check_data(self.name, options.data, "a JSONL file of unified trajectories")
        self._turns = setting(options, "turns", str, "one")
        if self._turns not in ("one", "all"):
            raise UserError(f"--set turns={self._turns}: must be `one` or `all`")

    def tasks(self) -> list[Task]:
        """Returns the requests. Raises `UserError` for an invalid trajectory, and if none calls a tool."""
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
                next_call.request(source, trajectory, turn)
                for source, trajectory in samples
                for turn in next_call.turns(trajectory)
            ]
        if not requests:
            raise UserError(f"{self._path}: no turn of its {len(samples)} trajectories calls a tool; use another file")
        names = [f"{request.source}/{request.id}/{request.turn}" for request in requests]
        if len(set(names)) < len(names):
            duplicate = next(name for at, name in enumerate(names) if name in names[:at])
            raise UserError(f"{self._path}: two trajectories have the id {duplicate.rsplit('/', 1)[0]}; ids are unique")
        return [Task(name, request, request.source) for name, request in zip(names, requests, strict=True)]

    async def run(self, task: Task, model: Model, agent: Agent) -> Outcome:
        """Sends one request and scores the calls."""
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
        return Outcome(scores, [*answer.prompt, answer.message], failure, {"expected": expected})
