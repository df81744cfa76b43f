"""Destinations of records: what a run measured, as lines of JSON, rows of a table, or text on the console.

A logger is any object with ``log(progress, values, kind)``. ``start(run)``, ``log_config(config)``,
``log_figure(progress, name, figure)``, ``log_text(progress, name, text)``, ``log_artifact(progress, name, path)``,
``flush()``, ``close(status)``, ``state_dict()`` and ``load_state_dict(state)`` are called where they exist.
"""

from loopwright.loggers.csv import CSVLogger
from loopwright.loggers.jsonl import JSONLLogger, read_jsonl
from loopwright.loggers.mlflow import MLflowLogger
from loopwright.loggers.named import logger_named
from loopwright.loggers.sending import send
from loopwright.loggers.table import TableLogger
from loopwright.loggers.tensorboard import TensorBoardLogger
from loopwright.loggers.tracking import flat, points, run_name
from loopwright.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger", "JSONLLogger", "MLflowLogger", "TableLogger", "TensorBoardLogger", "WandbLogger", "flat",
    "logger_named", "points", "read_jsonl", "run_name", "send",
]  # fmt: skip
