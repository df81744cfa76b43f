"""What Loopwright costs in microseconds, calls, frames, reads, bytes and milliseconds of import: all that is not a ratio.

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
from digits import FOLDER, LR, MOMENTUM, NOTHING, Lap, parts
from measure import ROOT, Goal
from step_costs import step_costs


def goals(options) -> list[Goal]:
    few, found = options.quick, []
    for measured in (lambda: step_costs(options), lambda: fixed_costs(30 if few else 200), calls_a_step, frames, device_reads,
                     lambda: imports(3 if few else 15), lambda: start_of_cli(3 if few else 15), lambda: memory(20_000 if few else 100_000)):
        try:
            found += measured()
        except Exception as error:                            # one that cannot be measured has failed; the others still count
            name = getattr(measured, "__name__", "")
            name = measured.__code__.co_names[0] if name == "<lambda>" else name
            found.append(Goal(f"{name}: not measured", float("inf"), "", 0, f"{type(error).__name__}: {error}"[:200]))
    return found


# ---------------------------------------------------------------- milliseconds a fit

def fixed_costs(count) -> list[Goal]:
    """A fit of one step minus the step by hand, each alone in turn; the process is warm."""
    batch = [[torch.randn(2, 8), torch.tensor([0, 1])]]
    def by_hand():
        net, optimizer = tiny()
        loss_of = nn.CrossEntropyLoss()
        start = time.perf_counter()
        for inputs, target in batch:
            optimizer.zero_grad()
            loss_of(net(inputs), target).backward()
            optimizer.step()
        return time.perf_counter() - start
    def ours(accuracy=True, **options):
        net, optimizer = tiny()
        start = time.perf_counter()
        metrics = {"accuracy": lw.metrics.Accuracy()} if accuracy else None
        lw.Trainer(epochs=1, **options).fit(lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics=metrics), train=batch)
        return time.perf_counter() - start
    extra_on, extra_off = [], []
    with measure.terminal():
        for _ in range(count + 3):
            base = by_hand()
            extra_off.append((ours(accuracy=False, **NOTHING) - base) * 1e3)
            extra_on.append((ours(folder=FOLDER) - base) * 1e3)
    return [Goal("fixed cost of a fit, defaults (folder, records, checkpoint)", statistics.median(extra_on[3:]), "ms", 60),
            Goal("fixed cost of a fit, nothing enabled", statistics.median(extra_off[3:]), "ms", 1)]


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
        task = lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
        lw.Trainer(epochs=1, folder=FOLDER).fit(task, train=loader)
    def ours_off(net, optimizer, loader):
        lw.Trainer(epochs=1, **NOTHING).fit(lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer), train=loader)
    def a_step(run):
        counts = []
        for steps in (100, 100, 1100):                       # the first warms up
            net, optimizer = tiny()
            loader = DataLoader(TensorDataset(torch.randn(2 * steps, 8), torch.zeros(2 * steps, dtype=torch.long)), 2, shuffle=True)
            calls = Counter()
            sys.setprofile(lambda frame, event, argument: calls.update((event,)))
            try:
                run(net, optimizer, loader)
            finally:
                sys.setprofile(None)
            counts.append(calls["call"])
        return (counts[2] - counts[1]) / 1000
    with measure.terminal():
        hand, on, off = a_step(by_hand), a_step(ours), a_step(ours_off)
    return [Goal("Python calls a step, nn.Linear(8, 3), defaults", on, "", 110, f"by hand {hand:.0f}; ours with all off {off:.0f}")]


def frames() -> list[Goal]:
    """Frames of ours from ``fit`` down to ``Tensor.backward``."""
    seen = []
    def look(frame, event, argument):
        if event == "call" and frame.f_code is torch.Tensor.backward.__code__ and not seen:
            while (frame := frame.f_back) is not None and Path(frame.f_code.co_filename).resolve() != Path(__file__).resolve():
                seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
    net, optimizer = tiny()
    task = lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    with measure.terminal():
        sys.setprofile(look)
        try:
            lw.Trainer(epochs=1, folder=FOLDER).fit(task, train=[[torch.randn(2, 8), torch.tensor([0, 1])]])
        finally:
            sys.setprofile(None)
    return [Goal("frames between the caller and `Tensor.backward`", len(seen), "", 4, " > ".join(reversed(seen)))]


def device_reads() -> list[Goal]:
    """Reads of a value back to Python, between two records that are 50 steps apart."""
    def reads(steps, **options):
        net, optimizer = tiny()
        batches = [[torch.randn(2, 8), torch.tensor([0, 1])]] * steps
        task = lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
        counted: Counter[str] = Counter()
        with counting_reads(counted):
            lw.Trainer(epochs=1, folder=FOLDER, checkpoint=False, **options).fit(task, train=batches)
        return counted
    def between(**options):
        few, many = reads(100, **options), reads(1100, **options)
        counts = {name: (many[name] - few[name]) / 20 for name in many if many[name] != few[name]}
        return sum(counts.values()), ", ".join(f"{name} {n:g}" for name, n in counts.items())
    with measure.terminal():
        on, off = between(), between(nonfinite=None)
    return [Goal("reads of values in 50 steps (one record), defaults on CPU", on[0], note=on[1]),
            Goal("reads of values in 50 steps (one record), nonfinite=None", off[0], note=off[1])]


@contextlib.contextmanager
def counting_reads(counted: Counter[str]):
    """Every way in which a tensor's value reaches Python counts here. Patches torch, which only a benchmark may."""
    names = ["item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"]
    own = {name: torch.Tensor.__dict__[name] for name in names if name in torch.Tensor.__dict__}
    def counting(name, read):
        def wrapped(tensor, *args, **kwargs):
            counted[name] += 1
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

def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment(), cwd=FOLDER)
    return time.perf_counter() - start


def imports(count) -> list[Goal]:
    """Medians over fresh processes, in turn; the first is left out, it fills the disk cache."""
    def within(code):
        code = f"import torch, time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment(), cwd=FOLDER)
        return float(done.stdout) * 1e3
    own, used = [], []
    for _ in range(count + 1):
        own.append(within("import loopwright"))
        used.append(within("import loopwright as lw; lw.Trainer, lw.Supervised, lw.metrics.Accuracy"))
    return [Goal("`import loopwright` over `import torch`", statistics.median(own[1:]), "ms", 60),
            Goal("the same and Trainer, Supervised and Accuracy, which are loaded at first use", statistics.median(used[1:]), "ms")]


def start_of_cli(count) -> list[Goal]:
    help_, python = [], []
    for _ in range(count + 1):
        help_.append(seconds("-m", "loopwright", "--help") * 1e3)
        python.append(seconds("-c", "pass") * 1e3)
    return [Goal("`python -m loopwright --help`", statistics.median(help_[1:]), "ms", 300, f"python alone {statistics.median(python[1:]):.0f} ms")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(lw.__file__).parents[1]), str(ROOT / "benchmarks")])}


def memory(steps) -> list[Goal]:
    """Bytes a step by which a fit with defaults grows after its first fifth, in a process of its own."""
    code = f"import costs; costs.print_growth({steps})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment(), cwd=FOLDER)
    return [Goal(f"memory over {steps:,} steps", float(done.stdout.splitlines()[-1]), "bytes a step", 8,
                 "4 are the loss of each step, the others room for the pages in which memory is counted")]


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
    task = lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
    batches = list(itertools.repeat([torch.randn(2, 8), torch.tensor([0, 1])], steps))
    start = steps // 5
    watch = Resident(start, steps)
    with measure.terminal():
        lw.Trainer(epochs=1, folder=FOLDER, callbacks=[watch]).fit(task, train=batches)
    print((watch.bytes[steps] - watch.bytes[start]) / (steps - start))
