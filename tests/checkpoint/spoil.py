"""Ways to spoil a checkpoint that is on disk, one after the other, each undone before the next."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopwright.checkpoint import read
from loopwright.errors import CheckpointError

BLOCK = 4096


@contextmanager
def restored(file: Path) -> Iterator[bytes]:
    good = file.read_bytes()
    try:
        yield good
    finally:
        file.write_bytes(good)


def flips(file: Path, draws: random.Random, *, count: int | None = None) -> Iterator[str]:
    """One bit of every byte, or of ``count`` of them."""
    with restored(file) as good:
        everywhere = range(len(good))
        for position in everywhere if count is None else sorted(draws.sample(everywhere, min(count, len(good)))):
            bad, bit = bytearray(good), draws.randrange(8)
            bad[position] ^= 1 << bit
            file.write_bytes(bad)
            yield f"{file.name}: bit {bit} of byte {position} flipped"


def cuts(file: Path, draws: random.Random, *, count: int) -> Iterator[str]:
    """Cut short at ``count`` places; longer by one byte."""
    with restored(file) as good:
        for size in sorted({0, len(good) - 1, *(draws.randrange(len(good)) for _ in range(count - 2))}):
            file.write_bytes(good[:size])
            yield f"{file.name}: cut to {size} of {len(good)} bytes"
        file.write_bytes(good + b"\0")
        yield f"{file.name}: longer by a byte"


def holes(file: Path) -> Iterator[str]:
    """A block of zeros wherever anything else stands."""
    with restored(file) as good:
        for start in range(0, len(good), BLOCK):
            block = good[start : start + BLOCK]
            if any(block):
                file.write_bytes(good[:start] + bytes(len(block)) + good[start + len(block) :])
                yield f"{file.name}: zeros from {start}"


def swaps(path: Path, other: Path) -> Iterator[str]:
    """Each file missing, and replaced by the one of another checkpoint where that is not the same; the manifest too."""
    for file in sorted(path.iterdir()):
        with restored(file) as good:
            file.unlink()
            yield f"{file.name}: missing"
            if (other / file.name).is_file() and (other / file.name).read_bytes() != good:
                shutil.copyfile(other / file.name, file)
                yield f"{file.name}: of another checkpoint"


def undetected(path: Path, damages: Iterator[str], *, instead: Path) -> tuple[int, list[str]]:
    """How many ``damages`` there were, and those that ``read(path)`` did not refuse as it should.

    It should name the damaged file (of a foreign manifest, any file that is not the one it knows) and offer
    ``instead``, the other checkpoint in that folder.
    """
    count, missed = 0, []
    for damage in damages:
        count += 1
        file, _, what = damage.partition(": ")
        foreign = file == "manifest.json" and what == "of another checkpoint"
        try:
            read(path)
        except CheckpointError as error:
            named = f"{path}/" in str(error) if foreign else file in str(error)
            if not named or not str(error).endswith(f"The newest good checkpoint beside it is {instead}"):
                missed.append(f"{damage}: {error}")
        except BaseException as error:
            missed.append(f"{damage}: {error!r}")
        else:
            missed.append(f"{damage}: not detected")
    return count, missed
