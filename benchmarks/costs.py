"""What Loopwright costs once a fit, and in calls, frames, reads, bytes and imports: all that is no time of a step.

Used by `overhead.py`. Every function measures one thing against the same thing written by hand.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
import measure
from digits import FOLDER, LR, MOMENTUM, NOTHING
from loopwright._compat import backward
from measure import ROOT, Goal
from step_costs import step_costs


def goals(options) -> list[Goal]:
    few, found = options.quick, []
    measurements = {
        "costs of a step": lambda: step_costs(options),
        "fixed costs": lambda: fixed_costs(30 if few else 200),
        "calls a step": calls_a_step,
        "frames": frames,
        "device reads": device_reads,
        "imports": lambda: imports(3 if few else 15),
        "start of the command line": lambda: start_of_cli(3 if few else 15),
        "memory": lambda: memory(20_000 if few else 100_000),
    }
    for name, measured in measurements.items():
        try:
            found += measured()
        except Exception as error:  # what cannot be measured has failed; the others still count
            found.append(Goal(f"{name}: not measured", float("inf"), "", 0, f"{type(error).__name__}: {error}"[:200]))
    return found


def supervised(net, optimizer, *, accuracy: bool = True):
    metrics = {"accuracy": lw.metrics.Accuracy()} if accuracy else None
    return lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics=metrics)


# ---------------------------------------------------------------- milliseconds a fit


def fixed_costs(count) -> list[Goal]:
    """A fit of one step minus the step by hand, in turn; the process is warm.

    Fits that write to the disk have turns of their own: after one of them the caches of the processor are cold. These
    are milliseconds, no ratio, and other programs on the same processor double them for seconds: the turns are spread
    over some seconds, of each the median counts, and of these that of the quietest turn. The note has that of all.
    """
    batch = [[torch.randn(2, 8), torch.tensor([0, 1])]]

    def by_hand():
        net, optimizer = tiny()
        start = time.perf_counter()
        loss_of = nn.CrossEntropyLoss()
        for inputs, target in batch:
            optimizer.zero_grad()
            loss_of(net(inputs), target).backward()
            optimizer.step()
        return time.perf_counter() - start

    def ours(accuracy=True, **options):
        net, optimizer = tiny()
        start = time.perf_counter()
        lw.Trainer(epochs=1, **options).fit(supervised(net, optimizer, accuracy=accuracy), train=batch)
        return time.perf_counter() - start

    with measure.terminal():
        off, on = [], []
        for _ in range(count // 10):
            off.append(statistics.median([ours(accuracy=False, **NOTHING) - by_hand() for _ in range(50)][10:]) * 1e3)
            on.append(statistics.median([ours(folder=FOLDER) - by_hand() for _ in range(10)][3:]) * 1e3)
    return [
        Goal("fixed cost of a fit, defaults (folder, records, checkpoint)", min(on), "ms", 60, _of_all(on)),
        Goal("fixed cost of a fit, nothing enabled", min(off), "ms", 1, _of_all(off)),
    ]


def _of_all(turns) -> str:
    return f"the quietest of {len(turns)} turns; the median of all {statistics.median(turns):.3g}"


def tiny():
    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    return net, torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)


# ---------------------------------------------------------------- calls, frames, reads


def calls_a_step() -> list[Goal]:
    """Python functions entered a step (``sys.setprofile``'s "call"; a resumed generator counts), from two run lengths.

    nn.Linear(8, 3), SGD with momentum, batches of 2 from a shuffled DataLoader, where a loop by hand makes 134.
    """

    def by_hand(net, optimizer, loader):
        loss_of = nn.CrossEntropyLoss()
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = loss_of(net(inputs), target)
            loss.backward()
            optimizer.step()

    def ours(net, optimizer, loader):
        lw.Trainer(epochs=1, folder=FOLDER).fit(supervised(net, optimizer), train=loader)

    def ours_off(net, optimizer, loader):
        lw.Trainer(epochs=1, **NOTHING).fit(supervised(net, optimizer, accuracy=False), train=loader)

    def a_step(run):
        counts = []
        for steps in (100, 100, 1100):  # the first warms up
            net, optimizer = tiny()
            samples = TensorDataset(torch.randn(2 * steps, 8), torch.zeros(2 * steps, dtype=torch.long))
            loader, events = DataLoader(samples, 2, shuffle=True), []
            sys.setprofile(lambda frame, event, argument, seen=events.append: seen(event))
            try:
                run(net, optimizer, loader)
            finally:
                sys.setprofile(None)
            counts.append(events.count("call"))
        return (counts[2] - counts[1]) / 1000

    with measure.terminal():
        hand, on, off = a_step(by_hand), a_step(ours), a_step(ours_off)
    note = f"by hand {hand:.0f}; ours with all off {off:.0f}"
    return [Goal("Python calls a step, nn.Linear(8, 3), defaults", on, "", 110, note)]


def frames() -> list[Goal]:
    """Frames of ours from ``fit`` down to ``backward``: torch's own, or the one that takes its place."""
    seen: list[str] = []

    def look(frame, event, argument):
        if event == "call" and frame.f_code in (torch.Tensor.backward.__code__, backward.__code__) and not seen:
            while (frame := frame.f_back) is not None and frame.f_code.co_filename != __file__:
                seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    net, optimizer = tiny()
    with measure.terminal():
        sys.setprofile(look)
        try:
            lw.Trainer(epochs=1, folder=FOLDER).fit(
                supervised(net, optimizer), train=[[torch.randn(2, 8), torch.tensor([0, 1])]]
            )
        finally:
            sys.setprofile(None)
    return [Goal("frames between the caller and `backward`", len(seen), "", 4, " > ".join(reversed(seen)))]


def device_reads() -> list[Goal]:
    """Reads of a value back to Python: with a record each 50 steps, and in the steps between two of them."""

    def reads(steps, **options):
        net, optimizer = tiny()
        batches = [[torch.randn(2, 8), torch.tensor([0, 1])]] * steps
        counted: Counter[str] = Counter()
        with counting_reads(counted):
            trainer = lw.Trainer(epochs=1, folder=FOLDER, checkpoint=False, **options)
            trainer.fit(supervised(net, optimizer), train=batches)
        return counted

    def between(**options):
        few, many = reads(100, **options), reads(1100, **options)
        counts = {name: (many[name] - few[name]) / 20 for name in many if many[name] != few[name]}
        return sum(counts.values()), ", ".join(f"{name} {n:g}" for name, n in counts.items())

    class Watched(lw.Callback):
        run = None

        def on_step_start(self, run):
            self.run = run

        def reads_apart(self):
            return self.run is not None and self.run.progress.step % 50 > 0

    def apart():
        counted, watched = Counter(), Watched()
        with counting_reads(counted, when=watched.reads_apart):
            net, optimizer = tiny()
            batches = [[torch.randn(2, 8), torch.tensor([0, 1])]] * 1000
            trainer = lw.Trainer(epochs=1, folder=FOLDER, checkpoint=False, nonfinite=None, callbacks=[watched])
            trainer.fit(supervised(net, optimizer), train=batches)
        return sum(counted.values())

    with measure.terminal():
        on, off = between(), between(nonfinite=None)
    return [
        Goal("reads of values in the 980 steps between records, nonfinite=None", apart(), "", 0),
        Goal("reads of values in 50 steps (one record), defaults on CPU", on[0], note=on[1]),
        Goal("reads of values in 50 steps (one record), nonfinite=None", off[0], note=off[1]),
    ]


@contextlib.contextmanager
def counting_reads(counted: Counter[str], when=lambda: True):
    """Every way in which a tensor's value reaches Python counts here. Patches torch, which only a benchmark may."""
    names = ["item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"]
    own = {name: torch.Tensor.__dict__[name] for name in names if name in torch.Tensor.__dict__}

    def counting(name, read):
        def wrapped(tensor, *args, **kwargs):
            counted[name] += when()
            return read(tensor, *args, **kwargs)

        return wrapped

    try:
        for name in names:
            setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield
    finally:
        for name in names:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)


# ---------------------------------------------------------------- fresh processes


def python(*arguments: str) -> str:
    """What a fresh Python prints that is started with these arguments. It may keep compiled modules, as users' do."""
    folders = [str(Path(lw.__file__).parents[1]), str(ROOT / "benchmarks")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables, cwd=FOLDER).stdout


def imports(count) -> list[Goal]:
    """Medians over fresh processes, in turn; the first is left out, it fills the disk cache."""

    def within(code):
        code = f"import torch, time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        return float(python("-c", code)) * 1e3

    own, used = [], []
    for _ in range(count + 1):
        own.append(within("import loopwright"))
        used.append(within("import loopwright as lw; lw.Trainer, lw.Supervised, lw.metrics.Accuracy"))
    return [
        Goal("`import loopwright` over `import torch`", statistics.median(own[1:]), "ms", 60),
        Goal("the same, and first use of Trainer, Supervised, Accuracy", statistics.median(used[1:]), "ms"),
    ]


def start_of_cli(count) -> list[Goal]:
    def milliseconds(*arguments: str) -> float:
        start = time.perf_counter()
        python(*arguments)
        return (time.perf_counter() - start) * 1e3

    shown, bare = [], []
    for _ in range(count + 1):
        shown.append(milliseconds("-m", "loopwright", "--help"))
        bare.append(milliseconds("-c", "pass"))
    note = f"python alone {statistics.median(bare[1:]):.0f} ms"
    return [Goal("`python -m loopwright --help`", statistics.median(shown[1:]), "ms", 300, note)]


def memory(steps) -> list[Goal]:
    """Bytes a step by which a fit with defaults grows after its first fifth, in a process of its own."""
    printed = python("-c", f"import costs; costs.print_growth({steps})")
    return [
        Goal(
            f"memory over {steps:,} steps",
            float(printed.splitlines()[-1]),
            "bytes a step",
            8,
            "4 are the loss of each step, the others room for the pages in which memory is counted",
        )
    ]


class Resident(lw.Callback):
    """Resident bytes after certain steps."""

    def __init__(self, *steps):
        self.steps, self.bytes = steps, {}

    def on_step_end(self, run, result):
        if run.progress.step in self.steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes[run.progress.step] = pages * os.sysconf("SC_PAGE_SIZE")


def print_growth(steps) -> None:
    torch.set_num_threads(1)
    net, optimizer = tiny()
    task = supervised(net, optimizer)
    batches = list(itertools.repeat([torch.randn(2, 8), torch.tensor([0, 1])], steps))
    start = steps // 5
    watch = Resident(start, steps)
    with measure.terminal():
        lw.Trainer(epochs=1, folder=FOLDER, callbacks=[watch]).fit(task, train=batches)
    print((watch.bytes[steps] - watch.bytes[start]) / (steps - start))
