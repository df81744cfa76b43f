"""How far the offline files of a run of W&B go: a process that is killed leaves them behind what it had logged."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["last_row"]

_BLOCK, _HEAD = 32768, 7  # bytes: the log format of LevelDB, after a head of the file of 7 bytes
_WHOLE, _LAST = 1, 4  # kinds of a part


def last_row(folder: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step of which ``folder/wandb`` has a row of this run, and the names in it; -1 without one."""
    from wandb.proto import wandb_internal_pb2

    last, names = -1, set[str]()
    for file in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        for message in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                found = {item.key or "/".join(item.nested_key) for item in record.history.item}
                names = found | names if step == last else found if step > last else names
                last = max(last, step)
    return last, names


def _messages(data: bytes) -> Iterator[bytes]:
    """The whole messages of a file, up to where it is torn."""
    at, message = _HEAD, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # no part begins in the last bytes of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        if len(part) < length or not kind:
            return
        at, message = at + 7 + length, message + part
        if kind in (_WHOLE, _LAST):
            yield message
            message = b""
