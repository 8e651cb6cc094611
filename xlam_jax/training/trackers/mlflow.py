"""MLflow."""

import re
import time

from xlam_jax.training.trackers.tracker import Flat, TrackedRun, flatten


class Mlflow:
    """An MLflow server or store, as MLFLOW_TRACKING_URI names it."""

    PARAMS_A_CALL, PARAM_LENGTH = 100, 6000

    def start(self, run: TrackedRun) -> str:
        import mlflow
        from mlflow.entities import Metric, Param

        self._client, self._metric = mlflow.MlflowClient(), Metric
        self._last: dict[str, int] = {}
        if run.own_name:
            self._id = run.own_name
            self._client.update_run(self._id, status="RUNNING")
            for kind, key in (("train", "loss"), ("heldout", "loss"), ("requests", "exact")):
                history = self._client.get_metric_history(self._id, f"{kind}/{key}")
                self._last[kind] = max((metric.step for metric in history), default=-1)
            return self._id
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        named = {self._name(key): str(value) for key, value in flatten(run.config, ".").items()}
        params = [Param(key, value[: self.PARAM_LENGTH]) for key, value in named.items()]
        for at in range(0, len(params), self.PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[at : at + self.PARAMS_A_CALL])
        return self._id

    def log(self, step: int, values: Flat) -> None:
        kind = next(iter(values), "").partition("/")[0]
        if step > self._last.get(kind, -1):  # it has the same values of earlier steps from before the run was killed
            now = round(time.time() * 1000)
            metrics = [self._metric(self._name(key), value, now, step) for key, value in values.items()]
            self._client.log_batch(self._id, metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    @staticmethod
    def _name(key: str) -> str:
        """Replaces the characters of a source's name that MLflow refuses."""
        return re.sub(r"[^\w/. -]", "_", key)
