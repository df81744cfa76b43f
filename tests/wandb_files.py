"""What the offline files of W&B hold, read by its own message types."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tracked import CURVES

BLOCK = 32768


def messages(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: the log format of LevelDB after a head of 7 bytes, up to where it is torn."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def read(folder: Path) -> list[Any]:
    """All records of a run, once W&B has closed its last file, which it does behind the back of ``finish``."""
    for _ in range(600):
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        found = [list(messages(file)) for file in files]
        if found and any(record.WhichOneof("record_type") == "exit" for record in found[-1]):
            return [record for records in found for record in records]
        time.sleep(0.1)
    pytest.fail(f"W&B has not closed its file in {folder}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, a dict a row, of all files of a run."""
    histories = [r.history.item for r in read(folder) if r.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in histories]


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    found = rows(folder)
    return {n: sorted((row["_step"], pytest.approx(row[n])) for row in found if n in row) for n in CURVES}
