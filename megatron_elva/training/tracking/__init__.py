"""MLflow: what a run writes to its directory is sent by a process of its own (docs/tracking.md).

The trainer holds a `Tracker`, which starts that process and tells it the end. Only `store.py` and `system.py`, which
run in that process, import mlflow.
"""

from megatron_elva.training.tracking.tracker import Tracker

__all__ = ["Tracker"]
