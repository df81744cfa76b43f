"""F2 and F3: several ranks that train together, one or all of which are sent a signal, raise, die, stand still or wait.

The ranks are real processes, forked from one that has torch: alone, as srun starts them, or below ``lw.launch`` or
torchrun, where the signal goes to those. F2: after a signal all save once and leave; gone on from, the run ends with
the bits of one that was left alone. F3: after a fault all leave in time, and say which rank it was, at which step, and
in which hook or line.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, read, verify
from reliability.server import ROOT
from reliability.trial import NAME, digests, observe

STEPS, AT, LIMIT_S = 96, 40, 30.0
TARGETS = ("one rank", "all ranks", "lw.launch", "one rank", "all ranks", "torchrun")
SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STATUS = {signal.SIGTERM: (143,), signal.SIGINT: (-2, 1), signal.SIGUSR1: (138,)}  # 1: KeyboardInterrupt in a fork
RAISES = (
    "on_fit_start", "on_stage_start", "on_epoch_start", "on_step_start", "on_batch_start", "map_batch", "map_output",
    "map_loss", "on_backward_end", "on_grads_ready", "on_step_end", "on_validation_start", "on_eval_batch_end",
    "on_validation_end", "on_checkpoint", "on_epoch_end", "on_stage_end", "on_fit_end",
)  # fmt: skip
OTHERWISE = r"collectives do not match at step \d+: .*"
IN_STEP = ("forward", "dataset", "backward")
IN_DATA = ("short loader",)
OTHERS = ("SIGKILL", "SIGSTOP", "alone in a barrier", "another shape", "short loader", "leaves", "slow")
KINDS = (
    *RAISES, *IN_STEP, *OTHERS, "SIGKILL", "SIGSTOP", "alone in a barrier", "slow", "SIGKILL", "forward",
    "on_step_end", "another shape", "SIGSTOP", "leaves", "backward", "short loader",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- in the ranks


class Numbers(torch.utils.data.Dataset[Any]):
    """Samples that take a moment; one of them may raise."""

    def __init__(self, folder: Path, rank: int, *, pause: float) -> None:
        self.x = torch.randn(128, 5, generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :3].argmax(1)
        self.began, self.pause, self.raises = folder / f"began-{rank}", pause, False

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        if not self.began.exists():
            self.began.touch()
        time.sleep(self.pause)
        if self.raises:
            spoil("dataset")
        return self.x[i], self.y[i]


class Net(nn.Module):
    """A net that may raise in its forward or backward.

    With buffers, DDP's forward waits for the other ranks; without, only its backward does.
    """

    def __init__(self, *, buffers: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if buffers else nn.Identity()
        self.body = nn.Sequential(nn.Linear(5, 16), norm, nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))
        self.raises = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises == "forward" and self.training:
            spoil("forward")
        out: torch.Tensor = self.body(x)
        if self.raises == "backward" and out.requires_grad:
            out.register_hook(lambda grad: spoil("backward"))
        return out


def spoil(kind: str) -> None:
    """What the chosen rank does when its moment has come."""
    here = Path(os.environ["LW_SPOILED"])
    if here.exists():  # a hook that all stages call: once
        return
    here.write_text(str(time.monotonic()))
    if kind == "alone in a barrier":
        dist.barrier()
    elif kind == "leaves":
        sys.stdout.flush()
        os._exit(0)
    elif kind == "slow":
        time.sleep(20)
    elif kind == "short loader":
        pass
    elif kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
    else:
        raise ValueError(f"spoiled in {kind}")


def spoiler(kind: str, net: Net, data: Numbers) -> lw.Callback:
    """A callback that does ``kind`` once step 40 is behind it; the hooks around training at their only time."""
    hook = kind if kind in RAISES else "on_step_end"

    def act(self: Any, run: lw.Run, *args: Any) -> Any:
        once = hook.startswith(("on_fit", "on_stage"))
        if not once and run.progress.step < AT:
            pass
        elif kind in ("forward", "backward"):
            net.raises = kind
        elif kind == "dataset":
            data.raises = True
        else:
            spoil(kind)
        return args[0] if hook.startswith("map_") else None

    arguments = ", ".join([*inspect.signature(getattr(lw.Callback, hook)).parameters][2:])
    scope: dict[str, Any] = {"act": act}
    exec(f"def {hook}(self, run{', ' if arguments else ''}{arguments}): return act(self, run, {arguments})", scope)
    return type("Spoiler", (lw.Callback,), {hook: scope[hook]})()


class Sums(lw.Callback):
    """Adds up three numbers over ranks after each step; from step 40 on, four on the rank that is chosen."""

    def __init__(self, mine: bool) -> None:
        self.mine = mine

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        wrong = self.mine and run.progress.step >= AT
        if wrong:
            Path(os.environ["LW_SPOILED"]).write_text(str(time.monotonic()))
        dist.all_reduce(torch.ones(4 if wrong else 3))


class Dies(lw.Callback):
    """Ends its process by SIGKILL at call ``nth`` inside of a window of accumulation, or of a validation."""

    def __init__(self, where: str, nth: int, folder: Path) -> None:
        self.where, self.nth, self.deep, self.spoiled = where, nth, 0, folder / "spoiled"

    def on_step_start(self, run: lw.Run) -> None:
        self.deep = 0

    def on_backward_end(self, run: lw.Run, *given: Any) -> None:
        self.deep += 1
        planned = run.open_step[0] or [1.0]
        if self.deep < len(planned):  # more of the window is to come
            self._count("window", run)

    def on_eval_batch_end(self, run: lw.Run, *given: Any) -> None:
        self._count("validation", run)

    def _count(self, where: str, run: lw.Run) -> None:
        self.nth -= where == self.where
        if where == self.where and self.nth == 0:
            self.spoiled.write_text(f"{where} after step {run.progress.step}")
            os.kill(os.getpid(), signal.SIGKILL)


def noisy(sample: Any) -> Any:
    """An augmentation that draws from torch."""
    return sample[0] + 0.1 * torch.randn(5), sample[1]


def train(
    folder: str, *, kind: str = "", target: int = -1, pause: float = 0.0005, dies: tuple[str, int] | None = None,
    workers: int = 0, accumulate: int = 1, steps: int = STEPS, every: int = 10, validate: int = 24,
    buffers: bool = True,
) -> None:  # fmt: skip
    """What each rank does; rank 0 leaves ``result.json``. It goes on from what is there.

    ``kind`` is done by the rank ``target``; ``dies``, the arguments of ``Dies``, by all.
    """
    place, rank = Path(folder), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    torch.manual_seed(rank + 5)  # ranks that were not seeded alike
    os.environ["LW_SPOILED"] = str(place / "spoiled")
    net, data = Net(buffers=buffers), Numbers(place, rank, pause=pause)
    spoilers = [spoiler(kind, net, data)] if rank == target and kind not in IN_DATA else []
    if kind == "another shape":
        spoilers = [Sums(rank == target)]
    if dies is not None:
        spoilers = [Dies(*dies, place)]
    batches: Any = lw.Loader(data, 16, shuffle=True, workers=workers, transform=noisy if accumulate > 1 else None)
    if kind == "short loader":  # a generator, whose length nobody can compare at the start

        def batches() -> Iterator[Any]:
            yield from zip(data.x.split(16), data.y.split(16), strict=True)
            if rank == target:
                spoil(kind)
            else:
                yield data.x[:16], data.y[:16]

    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 1e-2), metrics={"hits": lw.metrics.Accuracy()}
    )
    trainer = lw.Trainer(
        steps=steps, folder=place / "runs", name=NAME, progress=False, seed=3, log_every=5, validate_every=validate,
        callbacks=spoilers, checkpoint=lw.Checkpoint(every, keep=3), strategy=lw.DDP(timeout=LIMIT_S),
        accumulate=accumulate,
    )  # fmt: skip
    run = trainer.fit(task, batches, lw.Loader((data.x[:50], data.y[:50]), 16), resume="auto")
    if rank == 0:
        (place / "result.json").write_text(json.dumps(digests(observe(run))))
    if kind == "leaves":
        time.sleep(1)


def forked(folder: str, world: int, **settings: Any) -> None:
    """Fork the ranks with nobody above them who would end the others when one fails; note how each ended."""
    place, pids = Path(folder), []
    (place / "ended").unlink(missing_ok=True)
    port = 20000 + os.getpid() % 10000
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            out = os.open(place / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            train(folder, **settings)
            return
        pids.append(pid)
    _write(place / "pids", pids)
    codes: dict[int, int] = {}
    while len(codes) < world:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
    _write(place / "ended", [[codes[pid] for pid in pids], time.monotonic()])


def launched(folder: str, world: int, **settings: Any) -> None:
    """The ranks below ``lw.launch``."""
    _write(Path(folder) / "pids", [os.getpid()])
    lw.launch(lambda: train(folder, **settings), world)


def _write(path: Path, value: Any) -> None:
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)


# ---------------------------------------------------------------------------------------------- outside


@dataclass
class Outcome:
    """What came of one fault or signal; ``problems`` is empty if all was as it must be."""

    what: str
    seconds: float = 0.0  # until the last rank had gone
    late: bool = False  # the run had come to its end before the signal
    problems: list[str] = field(default_factory=list)


class Ranks:
    """The process below which the ranks are: forked here, or torchrun."""

    def __init__(self, how: str, folder: Path, world: int, **settings: Any) -> None:
        self.how, self.folder = how, folder
        arguments = json.dumps({"folder": str(folder), **settings})
        for old in ("pids", "ended", *(f"began-{rank}" for rank in range(world))):
            (folder / old).unlink(missing_ok=True)
        if how == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            with open(folder / "agent.err", "w") as said:
                command += ["-m", "reliability.worlds", arguments]
                self.pid = subprocess.Popen(command, stderr=said, env=environment, cwd=ROOT).pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._child(launched if how == "lw.launch" else forked, world, arguments)

    def _child(self, start: Callable[..., None], world: int, arguments: str) -> None:
        """Ends as a script does, with the status of what was raised."""
        os.dup2(os.open(self.folder / "agent.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 1
        try:
            start(world=world, **json.loads(arguments))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit status of the process above, or None if it is still there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None

    def kill(self) -> None:
        """Leave nothing."""
        for pid in [*self.pids(), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def pids(self) -> list[int]:
        """Of the ranks, or of the process above them where those are its own affair."""
        found = self.folder / "pids"
        pids: list[int] = json.loads(found.read_text()) if found.exists() else []
        return pids

    def text(self) -> str:
        """All that was written on standard error."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.err")))


def await_(found: Callable[[], bool], seconds: float) -> bool:
    """True as soon as it is ``found``, False if it is not after so many seconds."""
    until = time.monotonic() + seconds
    while not found():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def alone_run(folder: Path, world: int, **settings: Any) -> dict[str, str]:
    """The digests of a run that nothing disturbs."""
    folder.mkdir()
    ranks = Ranks("forked", folder, world, **settings)
    if ranks.wait(120) != 0:
        ranks.kill()
        raise RuntimeError(f"{world} ranks that nothing disturbs failed: {ranks.text()[-2000:]}")
    found: dict[str, str] = json.loads((folder / "result.json").read_text())
    return found


def signalled(
    target: str, world: int, rank: int, number: signal.Signals, delay: float, folder: Path, alone: dict[str, str],
    *, steps: int = STEPS, buffers: bool = True,
) -> Outcome:  # fmt: skip
    """Send ``number`` to ``target``, ``delay`` seconds after all ranks have read data; look, and go on."""
    outcome = Outcome(
        f"{number.name} to {target if target != 'one rank' else f'rank {rank}'} of {world}{_without(buffers)}"
    )
    folder.mkdir()
    how = target if target in ("lw.launch", "torchrun") else "forked"
    ranks = Ranks(how, folder, world, steps=steps, buffers=buffers)
    try:
        if not await_(lambda: all((folder / f"began-{r}").exists() for r in range(world)), 120):
            outcome.problems.append(f"training did not begin: {ranks.text()[-1000:]}")
            return outcome
        time.sleep(delay)
        pids = {"one rank": ranks.pids()[rank : rank + 1], "all ranks": ranks.pids()}.get(target, [ranks.pid])
        sent = time.monotonic()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        code = ranks.wait(2 * LIMIT_S)
        outcome.seconds = time.monotonic() - sent
        outcome.problems += _left(ranks, code, number, outcome.seconds)
        outcome.late = not outcome.problems and _record(folder)[1]["status"] == "done"
    finally:
        ranks.kill()
    if not outcome.problems:
        again = Ranks("forked", folder, world, steps=steps, buffers=buffers)
        code = again.wait(120)
        again.kill()
        if code != 0 or not (folder / "result.json").exists():
            outcome.problems.append(f"it does not go on: {again.text()[-2000:]}")
        else:
            found = json.loads((folder / "result.json").read_text())
            odd = [name for name, digest in alone.items() if found[name] != digest]
            outcome.problems += [f"gone on, it ends with other {', '.join(odd)}"] if odd else []
    return outcome


def _record(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the run, and what ``run.json`` in it says."""
    (file,) = (folder / "runs" / NAME).glob("*/run.json")
    return file.parent, json.loads(file.read_text())


def _left(ranks: Ranks, code: int | None, number: signal.Signals, seconds: float) -> Iterator[str]:
    """What is wrong after a signal."""
    if code is None:
        yield f"not gone after {seconds:.0f} s"
        return
    if seconds > LIMIT_S:
        yield f"gone after {seconds:.1f} s"
    folder, record = _record(ranks.folder)
    if record["status"] == "done":  # it had come to its end
        return
    if ranks.how == "forked":
        codes, _ = json.loads((ranks.folder / "ended").read_text())
        if not all(one in STATUS[number] for one in codes):
            yield f"the ranks left with {codes}: {ranks.text()[-1500:]}"
    elif ranks.how == "lw.launch" and code not in (*STATUS[number], 128 + number):
        yield f"lw.launch left with {code}: {ranks.text()[-1500:]}"
    if record["status"] != "interrupted":
        yield f"status {record['status']!r}: {ranks.text()[-1500:]}"
    checkpoints, stopped = list_checkpoints(folder / "checkpoints"), record["progress"]["step"]
    saved = read(checkpoints[-1]).info["step"] if checkpoints else None
    if saved != stopped:
        yield f"the newest checkpoint is of step {saved}, and the run stopped after step {stopped}"


def _without(buffers: bool) -> str:
    return "" if buffers else ", a net without buffers"


def faulty(kind: str, world: int, rank: int, folder: Path, *, buffers: bool = True) -> Outcome:
    """Let ``kind`` happen in ``rank``, and look at how all of them end and what they say."""
    outcome = Outcome(f"{kind} in rank {rank} of {world}{_without(buffers)}")
    folder.mkdir()
    ranks = Ranks("forked", folder, world, kind=kind, target=rank, buffers=buffers)
    spoiled = folder / "spoiled"
    try:
        await_(spoiled.exists, 120)
        code = ranks.wait(2 * LIMIT_S)
        if not spoiled.exists() or not spoiled.read_text():
            outcome.problems.append(f"it never came to the point: {ranks.text()[-1000:]}")
            return outcome
        if code is None:
            outcome.seconds = 2 * LIMIT_S
            outcome.problems.append(f"not gone after {2 * LIMIT_S:.0f} s: {ranks.text()[-1000:]}")
            return outcome
        codes, ended = json.loads((folder / "ended").read_text())
        outcome.seconds = ended - float(spoiled.read_text())
        texts = [(folder / f"{r}.err").read_text() for r in range(world)]
        outcome.problems += _said(kind, rank, codes, texts)
        if kind != "slow" and outcome.seconds > LIMIT_S:
            outcome.problems.append(f"gone after {outcome.seconds:.1f} s")
        for checkpoint in list_checkpoints(next((folder / "runs" / NAME).iterdir()) / "checkpoints"):
            verify(checkpoint)
    finally:
        ranks.kill()
    return outcome


def _said(kind: str, rank: int, codes: list[int], texts: list[str]) -> Iterator[str]:
    """What is wrong with how the ranks ended and with what they wrote."""
    if kind == "slow":
        if codes != [0] * len(codes) or any("[loopwright] rank" in text for text in texts):
            yield f"a rank that is slow is no fault: {codes}, {texts[0][-1000:]}"
        return
    own = {"SIGKILL": -signal.SIGKILL, "SIGSTOP": -signal.SIGKILL, "leaves": 0}.get(kind)
    if any(code == 0 for r, code in enumerate(codes) if r != rank) or (own is not None and codes[rank] != own):
        yield f"the ranks left with {codes}"
    gone = rf"rank {rank} ended without a word, killed or crashed \(its last report, which came [\d.]+ s ago: at step"
    names = {
        "SIGKILL": gone,
        "SIGSTOP": rf"rank {rank} has not been heard of for \d+ s: its process was stopped by a signal \(its last ",
        "leaves": gone,
        "alone in a barrier": rf"{OTHERWISE}rank {rank}: barrier\(\), .*worlds\.py:\d+ in spoil",
        "another shape": rf"{OTHERWISE}rank {rank}: all_reduce\(float\[4\]\), .*worlds\.py:\d+ in on_step_end",
        "short loader": rf"{OTHERWISE}rank {rank}: ",
    }
    raised = rf"rank {rank} failed at step \d+, .*worlds\.py:\d+ in spoil: ValueError: spoiled in {kind}"
    pattern = names.get(kind, raised)
    for r, text in enumerate(texts):
        if (r != rank or own is None) and not re.search(pattern, text):
            yield f"rank {r} does not say {pattern}: {text[-1200:]}"
    if kind in RAISES and f"in Spoiler.{kind}" not in texts[rank]:
        yield f"the hook is not named: {texts[rank][-1000:]}"
    if pattern == raised:  # by the note on its own error, and by what all ranks are told
        steps = set(re.findall(rf"rank {rank} failed at step (\d+)|\] .*after epoch .* step (\d+)", texts[rank]))
        if len({one or other for one, other in steps}) != 1:
            yield f"the step is told as {steps}: {texts[rank][-1000:]}"
    if pattern == gone:  # the others say where they are themselves
        for r, text in enumerate(texts):
            if r != rank and set(re.findall(r"(?:ends at|open epoch,) step (\d+)", text)) != {str(AT)}:
                yield f"rank {r} does not say that it was at step {AT}: {text[-1200:]}"
    last = [int(step) for step in re.findall(r"its last report.*: at step (\d+)", "\n".join(texts))]
    if any(step > AT for step in last):
        yield f"it died in step {AT}, and its last report is said to be of {last}"


def signals(
    count: int, *, seed: int = 19, worlds: tuple[int, ...] = (2, 4), within: float = 1.0, steps: int = STEPS,
    say: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """F2: ``count`` signals, to each of the targets in turn, with 2 and 4 ranks, ``within`` seconds from the start.

    With more than one round of the targets every second net has no buffers.
    """
    draws, outcomes = random.Random(seed), list[Outcome]()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        alone = {
            (world, buffers): alone_run(place / f"alone-{world}-{buffers}", world, steps=steps, buffers=buffers)
            for world in worlds
            for buffers in ((True, False) if count > len(TARGETS) else (True,))
        }
        for i in range(count):
            target, world = TARGETS[i % len(TARGETS)], worlds[i // len(TARGETS) % len(worlds)]
            number = signal.SIGTERM if target == "torchrun" else SIGNALS[i // len(TARGETS) % len(SIGNALS)]
            rank, delay = draws.randrange(world), draws.uniform(0, within)
            buffers = count <= len(TARGETS) or (i + i // (2 * len(TARGETS))) % 2 == 0  # each target with and without
            outcomes.append(
                signalled(
                    target, world, rank, number, delay, place / f"{i}", alone[world, buffers], steps=steps,
                    buffers=buffers,
                )
            )  # fmt: skip
            if say is not None:
                say(outcomes[-1])
    return {**_summed(outcomes, seed), "after the end of the run": sum(outcome.late for outcome in outcomes)}


def faults(count: int, *, seed: int = 23, say: Any = None) -> dict[str, Any]:
    """F3: ``count`` faults, all kinds in turn, in ranks drawn at random, every third time with 4 of them.

    Every second kind is done to a net without buffers, and when it comes again to one of the other sort.
    """
    draws, outcomes = random.Random(seed), list[Outcome]()
    with tempfile.TemporaryDirectory() as name:
        for i in range(count):
            world = 4 if i % 3 == 2 else 2
            kind, before = KINDS[i % len(KINDS)], [KINDS[j % len(KINDS)] for j in range(i)]
            buffers = (KINDS.index(kind) + before.count(kind)) % 2 == 0
            outcomes.append(faulty(kind, world, draws.randrange(world), Path(name) / f"{i}", buffers=buffers))
            if say is not None:
                say(outcomes[-1])
    return _summed(outcomes, seed)


def _summed(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        "count": len(outcomes),
        "failures": {f"{i}: {o.what}": o.problems for i, o in enumerate(outcomes) if o.problems},
        "seed": seed,
        "of nets without buffers": sum(o.what.endswith(_without(False)) for o in outcomes),
        "slowest": f"{slowest.seconds:.1f} s, {slowest.what}",
    }


if __name__ == "__main__":
    from reliability import worlds  # by its name: a resume compares classes, and those of __main__ are others

    worlds.train(**json.loads(sys.argv[1]))
