"""Tests against the real trackers, offline: ``make trackers`` installs them; elsewhere these files are left out."""

from __future__ import annotations

import os
from importlib.util import find_spec

if not all(map(find_spec, ("tensorboard", "mlflow", "wandb"))):
    collect_ignore_glob = ["test_*.py"]
# nothing is sent anywhere, and nothing is printed
os.environ |= {
    "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
    "WANDB_MODE": "offline",  # its client looks once in a process
    "POLYAXON_TRACKING_FLUSH_DELAY": "0", "POLYAXON_NO_CONFIG": "true",
}  # fmt: skip
