"""Destinations of records: what a run measured, as lines of JSON, rows of a table, or text on the console.

A logger is any object with ``log(progress, values, kind)``. ``start(run)``, ``close(status)``,
``state_dict()`` and ``load_state_dict(state)`` are called where they exist.
"""

from loopwright.loggers.csv import CSVLogger
from loopwright.loggers.jsonl import JSONLLogger, read_jsonl
from loopwright.loggers.table import TableLogger

__all__ = ["CSVLogger", "JSONLLogger", "TableLogger", "read_jsonl"]
