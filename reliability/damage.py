"""D4: the newest checkpoint is damaged; that is seen, the file is named, and the run goes on from the older one."""

from __future__ import annotations

import itertools
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loopwright as lw
from loopwright.checkpoint import read
from loopwright.errors import CheckpointError, LoopwrightWarning
from loopwright.resume import find_point
from reliability.trial import NAME, differences, memory, observe, train
from reliability.variants import VARIANTS

SEED, VARIANT = 3, "dropout and batch norm"
FLIPS, CUTS, HOLES, SWAPS = 1000, 200, 100, 50
GOOD, BAD = "step-00000093", "step-00000095"
Damage = tuple[str, str]  # the name of the file (of several, the first), and what was done to it


def damages(path: Path, older: Path, foreign: Path, draws: random.Random, share: float) -> Iterator[Damage]:
    """Damage the checkpoint ``path`` in one way after the other, each undone before the next."""
    files = sorted(path.iterdir())
    for file in files:
        yield from _flips(file, draws, round(FLIPS * share / len(files)))
        yield from _cuts(file, draws, round(CUTS * share / len(files)))
        yield from _holes(file, draws, round(HOLES * share / len(files)))
    swaps = list(_swaps(path, older, foreign))
    for name, others in swaps if share == 1 else draws.sample(swaps, round(SWAPS * share)):
        with _restored(path):
            for file, data in others:
                file.unlink(missing_ok=True)
                if data is not None:
                    file.write_bytes(data)
            yield others[0][0].name, name


@contextmanager
def _restored(path: Path) -> Iterator[None]:
    good = {file: file.read_bytes() for file in path.iterdir()}
    try:
        yield
    finally:
        for file, data in good.items():
            file.write_bytes(data)


def _flips(file: Path, draws: random.Random, count: int) -> Iterator[Damage]:
    good = file.read_bytes()
    for position in draws.sample(range(len(good)), min(count, len(good))):
        bad, bit = bytearray(good), draws.randrange(8)
        bad[position] ^= 1 << bit
        file.write_bytes(bad)
        yield file.name, f"bit {bit} of byte {position} flipped"
    file.write_bytes(good)


def _cuts(file: Path, draws: random.Random, count: int) -> Iterator[Damage]:
    good = file.read_bytes()
    for size in sorted({0, len(good) - 1, *draws.sample(range(1, len(good) - 1), count - 2)}):
        file.write_bytes(good[:size])
        yield file.name, f"cut to {size} of {len(good)} bytes"
    file.write_bytes(good)


def _holes(file: Path, draws: random.Random, count: int) -> Iterator[Damage]:
    good = file.read_bytes()
    while count:
        size = draws.choice([8, 64, 512, 4096])
        start = draws.randrange(0, max(1, len(good) - size))
        if any(good[start : start + size]):  # zeros in place of zeros are no damage
            count -= 1
            file.write_bytes(good[:start] + bytes(len(good[start : start + size])) + good[start + size :])
            yield file.name, f"{size} zeros from byte {start}"
    file.write_bytes(good)


def _swaps(path: Path, older: Path, foreign: Path) -> Iterator[tuple[str, list[tuple[Path, bytes | None]]]]:
    """Files that are missing, empty, of another checkpoint, of another run, or in one another's place."""
    files = sorted(path.iterdir())
    for file in files:
        yield "missing", [(file, None)]
        yield "emptied", [(file, b"")]
        for text, other in (("of an older checkpoint", older), ("of another run", foreign)):
            if (other / file.name).read_bytes() != file.read_bytes():
                yield text, [(file, (other / file.name).read_bytes())]
    for one, two in itertools.permutations(files, 2):
        yield f"holds what {two.name} holds", [(one, two.read_bytes())]
    for one, two in itertools.combinations(files, 2):
        yield f"missing, and so is {two.name}", [(one, None), (two, None)]
    for other in (older, foreign):
        shards = [file for file in files if file.suffix == ".safetensors"]
        yield "all shards of another checkpoint", [(file, (other / file.name).read_bytes()) for file in shards]


def run(share: float = 1.0, *, seed: int = 5, fits: int = 10) -> dict[str, Any]:
    """Damage and look; every ``fits``-th time the run goes on to its end as well."""
    draws, failures, counts, done, began = (
        random.Random(seed),
        dict[str, str](),
        dict[str, int](),
        0,
        time.perf_counter(),
    )
    make = VARIANTS[VARIANT]
    with memory() as place:
        root = Path(place)
        saver = lw.Checkpoint("1 steps", keep=4, at_end=False)
        known, _, _ = train(make, root / "runs", seed=SEED, checkpoint=saver)
        expected = observe(known)
        other, _, _ = train(
            make, root / "other", seed=SEED + 1, checkpoint=lw.Checkpoint("1 steps", keep=2, at_end=False)
        )
        assert known.folder is not None
        assert other.folder is not None
        shelf = known.folder / "checkpoints"
        for path in (shelf / "step-00000096", shelf / "step-00000094"):
            shutil.rmtree(path)
        (shelf / "index.json").unlink()
        good, bad = shelf / GOOD, shelf / BAD
        for number, (file, what) in enumerate(damages(bad, good, other.folder / f"checkpoints/{BAD}", draws, share)):
            kind = "swaps" if not what[-1].isdigit() and "flip" not in what and "cut" not in what else what.split()[0]
            counts[kind] = counts.get(kind, 0) + 1
            problem = _look(bad, good, file, root / "runs", gone=what.startswith("missing") and file == "manifest.json")
            if problem is None and number % fits == 0:
                done += 1
                problem = _goes_on(known.folder, root / "again", make, expected, bad)
            if problem is not None:
                failures[f"{file}: {what}"] = problem
    kinds = {"bit": "bit flips", "cut": "truncations", "swaps": "missing, foreign or swapped files"}
    named = {kinds.get(k, "zeroed blocks"): 0 for k in counts}
    for kind, n in counts.items():
        named[kinds.get(kind, "zeroed blocks")] += n
    return {
        "count": sum(counts.values()), "kinds": named, "resumed to the end": done, "failures": failures, "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _look(bad: Path, good: Path, file: str, root: Path, *, gone: bool) -> str | None:
    """What is wrong with how the damage was met."""
    try:
        read(bad)
    except CheckpointError as error:
        if file not in str(error) and f"{bad}/" not in str(error):
            return f"the file is not named: {error}"
        if str(good) not in str(error):
            return f"the older checkpoint is not offered: {error}"
    except BaseException as error:
        return f"{type(error).__name__} instead of a CheckpointError: {error}"
    else:
        return "not detected"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        point = find_point("auto", root, NAME)
    if point is None or point.data.path != good:
        return f"resume='auto' takes {point and point.data.path}"
    warned = [str(w.message) for w in said if issubclass(w.category, LoopwrightWarning)]
    if not gone and not any(bad.name in text for text in warned):  # without a manifest it is no checkpoint
        return "resume='auto' passes over it without a warning"
    return None


def _goes_on(folder: Path, root: Path, make: Any, expected: dict[str, Any], bad: Path) -> str | None:
    """Resume a copy of the run with its damaged checkpoint, to the end."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folder, root / NAME / folder.name)
    try:
        saver = lw.Checkpoint("1 steps", keep=4)  # writes where the damaged one is
        run, _, _ = train(make, root, seed=99, resume="auto", checkpoint=saver, warn=True)
    except Exception as error:
        return f"resume='auto': {type(error).__name__}: {error}"
    odd = differences(expected, observe(run))
    return f"resumed to other {odd}" if odd else None
