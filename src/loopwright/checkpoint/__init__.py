"""Checkpoints: a typed codec, an atomic store that verifies what it reads, and the snapshot of a run."""

from loopwright.checkpoint.decode import decode
from loopwright.checkpoint.encode import check, encode
from loopwright.checkpoint.publish import delete, sweep
from loopwright.checkpoint.shelf import find, index, list_checkpoints, newest, write_index
from loopwright.checkpoint.store import Contents, Packed, read, verify, write

__all__ = [
    "Contents",
    "Packed",
    "check",
    "decode",
    "delete",
    "encode",
    "find",
    "index",
    "list_checkpoints",
    "newest",
    "read",
    "sweep",
    "verify",
    "write",
    "write_index",
]
