"""MLflow. Its environment variables, such as MLFLOW_TRACKING_URI, are respected."""

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tracker import TrackedRun

_TAG = "shampax.run"  # holds the id of the run: MLflow draws ids of its own


@dataclasses.dataclass(frozen=True)
class MLflow:
    """Track in an experiment of MLflow.

    Attributes:
      uri: a server or a store; "" takes MLFLOW_TRACKING_URI, or the folder `mlruns` beside the workdir.
      experiment: "" takes MLFLOW_EXPERIMENT_NAME, or "shampax".
    """

    uri: str = ""
    experiment: str = ""

    def open(self, run: TrackedRun) -> "_Session":
        """Begin or continue the run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            beside = Path.cwd() if "://" in run.workdir else Path(run.workdir).parent
            uri = (beside / "mlruns").as_uri()
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a data base would need further packages
        client = MlflowClient(uri)
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "shampax")
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        found = client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if found:
            id = found[0].info.run_id
            client.update_run(id, status="RUNNING")
        else:
            id = client.create_run(experiment, run_name=run.name, tags={_TAG: run.id}).info.run_id
            client.log_dict(id, run.config, "config.json")
            knobs = [Param(key, str(value)[:6000]) for key, value in _flat(run.config).items()]
            for first in range(0, len(knobs), 100):  # the most that a request may have
                client.log_batch(id, params=knobs[first : first + 100])
        return _Session(client, id)


class _Session:
    def __init__(self, client: Any, id: str):
        self._client, self._id = client, id
        history = client.get_run(id).data.metrics and client.get_metric_history(id, "train/loss")
        self._tracked = max((each.step for each in history or ()), default=-1)  # MLflow would show these steps twice

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step < self._tracked:
            return
        now = int(1000 * time.time())
        # Names have letters, digits and _-./ and blanks.
        metrics = [Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def texts(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        shown = "\n\n".join(f"{each['prompt']} ... {each['text']}" for each in texts)
        self._client.log_text(self._id, shown, f"samples/{step}.txt")

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
