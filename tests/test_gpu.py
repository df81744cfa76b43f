"""What only a GPU can show: the bits of the loop by hand there, the scaler, and how often the device is read."""

from __future__ import annotations

import copy
import sys
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.data import ahead, move
from pictures import N, images, net, spy
from tiny import acts, bits, classifier, loader, same, samples, sgd_task, trainer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def batches() -> list[Any]:
    x, y = samples(64)
    return [[x[i : i + 8].to(CUDA), y[i : i + 8].to(CUDA)] for i in range(0, 64, 8)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_the_bits_are_those_of_the_loop_by_hand(precision: str) -> None:
    net = classifier(dropout=0.2).to(CUDA)
    ours = copy.deepcopy(net)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    held = torch.float64 if precision == "fp64" else torch.float32
    net.to(held)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    torch.manual_seed(5)
    for _ in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=not precision.startswith(("fp32", "fp64"))):
                loss = cross_entropy(net(x.to(held)), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    torch.manual_seed(5)
    task = lw.Supervised(ours, cross_entropy, torch.optim.Adam(ours.parameters(), lr=0.01))
    run = trainer(epochs=2, precision=precision, clip_norm=1.0, device="cuda").fit(task, batches())
    assert same(ours.state_dict(), net.state_dict())
    assert run.device == CUDA
    if precision == "fp16":
        assert run.precision.scaler is not None
        assert run.precision.scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize(("nonfinite", "reads"), [(None, 0), ("raise", 1)])
def test_the_device_is_read_once_a_step_for_the_check_and_else_only_at_records(
    nonfinite: str | None, reads: int
) -> None:
    """torch itself warns of each call that waits for the device."""
    at: list[int] = []

    def begin(run: lw.Run) -> None:
        if run.progress.step == 2:
            torch.cuda.set_sync_debug_mode("warn")
        at.append(len(caught))

    net = classifier().to(CUDA)
    task = lw.Supervised(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
    data = batches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            user = trainer(epochs=1, nonfinite=nonfinite, callbacks=[acts(on_step_start=begin)], log_every="1000 steps")
            user.fit(task, data)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    between = [b - a for a, b in pairwise(at[2:])]
    assert between == [reads] * 5


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item")


@pytest.mark.parametrize("reads", [False, True])
def test_a_trace_of_steps_between_two_records_has_no_wait_for_the_device(reads: bool) -> None:
    """Workers, pinned memory, a metric, a history: torch's profiler sees each call of CUDA that stops the host."""
    task = lw.Supervised(
        net := classifier().to(CUDA), cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )  # fmt: skip
    x, y = samples(96)
    data = DataLoader(list(zip(x, y, strict=True)), 8, num_workers=1, pin_memory=True)
    trace = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    )
    between = torch.profiler.record_function("between")

    def look(run: lw.Run, result: lw.StepResult) -> None:
        if run.progress.step == 3:
            trace.start()
            between.__enter__()
        elif run.progress.step == 9:
            between.__exit__(None, None, None)
            torch.cuda.synchronize()
            trace.stop()
        elif reads and run.progress.step == 6:
            float(result.values["loss"])

    trainer(epochs=1, nonfinite=None, callbacks=[acts(on_step_end=look)], log_every="1000 steps").fit(task, data)
    events = trace.events()
    (span,) = [one.time_range for one in events if one.name == "between" and one.device_type.name == "CPU"]
    waits = [one.name for one in events if one.name in WAITS and span.start <= one.time_range.start <= span.end]
    assert bool(waits) is reads, waits


def test_activations_that_are_computed_again_give_the_same_bits() -> None:
    ends = []
    for again in (False, True):
        torch.manual_seed(2)
        net = nn.Sequential(*(classifier(dropout=0.3, seed=i) if i == 0 else nn.Linear(3, 3) for i in range(3)))
        if again:
            lw.checkpoint_activations(net, "0")
        task = lw.Supervised(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
        trainer(epochs=2, seed=3, device="cuda").fit(task, loader(32, batch_size=8, shuffle=True))
        ends.append({name: value.cpu() for name, value in net.state_dict().items()})
    assert same(*ends)


def test_a_resumed_run_on_a_gpu_goes_on_with_its_scale(folder: Any) -> None:
    def fit(steps: int, where: Any, resume: Any = None) -> lw.Run:
        net = classifier(dropout=0.2)
        task = lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.01))
        user = trainer(
            steps=steps, precision="fp16", device="cuda", seed=1, deterministic=True, folder=where, name="n",
            checkpoint=where is not None,
        )  # fmt: skip
        return user.fit(task, loader(64, batch_size=8, shuffle=True), resume=resume)

    whole = fit(12, None)
    fit(5, folder)
    run = fit(12, folder, "auto")
    assert run.resumed_from is not None
    assert run.exact is True
    assert same(*(bits(*r.models.values(), *r.optimizers.values())[:2] for r in (whole, run)))


@pytest.mark.slow
def test_compiled_steps_train_as_eager_ones_do_within_rounding() -> None:
    ends = []
    for compile in (False, True):
        net = classifier()
        task = lw.Supervised(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
        run = trainer(epochs=2, compile=compile, device="cuda", seed=1).fit(task, loader(37, batch_size=8))
        ends.append(net.state_dict())
    assert run.compiler.graphs == 2
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_cuda_graph_modes_of_the_compiler_are_refused() -> None:
    net = classifier()
    task = lw.Supervised(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(lw.PlanError, match="gives each step's output the memory of the one before"):
        trainer(epochs=1, compile={"mode": "reduce-overhead"}, device="cuda").fit(task, loader())


@pytest.mark.parametrize(
    "settings", [{}, {"nonfinite": None}, {"clip_norm": 0.1, "accumulate": 3}, {"precision": "bf16"}]
)
@pytest.mark.parametrize("make", ["sgd", "adamw"])
def test_recorded_steps_leave_the_bits_of_those_that_are_not(make: str, settings: dict[str, Any]) -> None:
    found = []
    for recorded in (False, True):
        net = classifier(dropout=0.3, batch_norm=True).to(CUDA)
        rate = torch.tensor(0.01, device=CUDA)
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=rate, capturable=True)
        schedule = lw.schedules.cosine(0.1, 0.001)
        if make == "sgd":
            optimizer, schedule = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), None
        task = lw.Supervised(net, cross_entropy, optimizer, schedule=schedule, metrics={"acc": lw.metrics.Accuracy()})
        user = trainer(epochs=5, seed=1, device="cuda", cuda_graphs=recorded, **settings)
        run = user.fit(task, loader(37, batch_size=8, shuffle=True))
        found.append(
            (net.state_dict(), optimizer.state_dict(), {name: list(all) for name, all in run.history.losses.items()})
        )
    assert run.graphs.recorded == 2
    assert same(*found)


def test_a_recorded_step_that_is_not_finite_moves_nothing() -> None:
    data = batches()
    spoilt = [torch.full_like(data[0][0], torch.nan), data[0][1]]
    ends = []
    for recorded in (False, True):
        net = classifier().to(CUDA)
        user = trainer(epochs=2, device="cuda", nonfinite="skip", cuda_graphs=recorded)
        run = user.fit(sgd_task(net, lr=0.1, loss=cross_entropy), [*data, spoilt, *data])
        assert run.skipped == 2
        ends.append(net.state_dict())
    assert same(*ends)


def test_a_step_that_reads_the_device_cannot_be_recorded() -> None:
    def loss(preds: Any, target: Any) -> Any:
        found = cross_entropy(preds, target)
        return found * max(1.0, found.item())

    net = classifier().to(CUDA)
    with pytest.raises(lw.SettingError, match="reads nothing from the device"):
        trainer(epochs=2, device="cuda", cuda_graphs=True).fit(sgd_task(net, lr=0.1, loss=loss), batches())
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["adam", "radam", "lamb", "sgd"])
def test_a_step_of_step_functions_is_recorded_in_a_cuda_graph(name: str) -> None:
    """With ``capturable=True`` nothing is read from the device; each replay is the next step."""
    optim: Any = lw.optim
    steps = optim.lookahead(optim.decay, getattr(optim, name))
    weights = [nn.Parameter(torch.linspace(-1, 1, 8, device=CUDA)) for _ in range(2)]
    optimizers = [optim.Stepwise([w], steps, lr=0.01, k=3, capturable=True) for w in weights]
    for weight in weights:
        weight.grad = torch.linspace(1, 2, 8, device=CUDA)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizers[0].step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(6):
        graph.replay()
    for _ in range(8):
        optimizers[1].step()
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert optimizers[0].state[weights[0]]["step"].item() == 8


class Drawn(Dataset[Any]):
    """Pictures that are drawn when they are read."""

    def __len__(self) -> int:
        return 27

    def __getitem__(self, i: int) -> Any:
        return torch.randn(3, 16, 16), i % 3


def drawn() -> DataLoader[Any]:
    return DataLoader(Drawn(), 4, shuffle=True, num_workers=2, pin_memory=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"nonfinite": None}, {"accumulate": 2}, {"precision": "bf16"}, {"precision": "fp64"}, {"cuda_graphs": True}],
    ids=str,
)
def test_batches_that_are_copied_ahead_leave_the_bits_of_those_that_are_not(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Counted(ahead.CudaCopier):
        def begin(self, tensors: list[Any]) -> Any:
            begun.append(len(tensors))
            return super().begin(tensors)

    monkeypatch.setattr(ahead, "CudaCopier", Counted)
    found = []
    for least in (sys.maxsize, 1):
        monkeypatch.setattr(ahead, "_LEAST", least)
        begun.clear()
        torch.manual_seed(4)
        net = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).to(CUDA)
        user = trainer(epochs=4, device="cuda", validate_every="3 steps", **settings)
        run = user.fit(sgd_task(net, lr=0.1, loss=cross_entropy), drawn(), drawn())
        losses = {name: list(values) for name, values in run.history.losses.items()}
        found.append((net.state_dict(), losses, run.metrics["valid/loss"], torch.get_rng_state()))
    assert same(*found)
    assert len(begun) >= 4 * 7
    assert set(begun) == ({1} if "precision" in settings and settings["precision"] == "fp64" else {2})


def test_a_copy_that_is_made_ahead_waits_for_nobody_and_leaves_memory_alone_that_is_still_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are slow and keep nothing, so that each batch gets memory of one before it; the host is far ahead."""
    monkeypatch.setattr(ahead, "_LEAST", 1)
    n = 1 << 20
    batches = [torch.full((n,), float(i)).pin_memory() for i in range(12)]
    taken = ahead.Ahead(iter(batches), ahead.CudaCopier(CUDA, None))
    sums = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in taken:
            moved = move(batch, CUDA)
            torch.cuda._sleep(20_000_000)
            sums.append(moved.double().mean())
            other = torch.full((n,), -1.0, device=CUDA)  # takes what has come free
            del moved, other, batch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [one.item() for one in sums] == [float(i) for i in range(12)]


def test_one_batch_more_is_on_the_device_and_none_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LEAST", 1)
    n = 1 << 20  # numbers of 4 bytes
    taken = ahead.Ahead((torch.ones(n).pin_memory() for _ in range(6)), ahead.CudaCopier(CUDA, None))
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    for _ in range(4):
        move(next(taken), CUDA)
    assert torch.cuda.max_memory_allocated(CUDA) - before == 2 * 4 * n
    taken.close()
    assert torch.cuda.memory_allocated(CUDA) == before


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
def test_batches_are_mixed_on_the_device_by_the_draws_of_the_cpu() -> None:
    def mixed(device: str) -> list[Any]:
        seen: list[Any] = []
        callbacks = [lw.MixUp(classes=N), lw.CutMix(classes=N), lw.RandomErasing(value=0.0), spy(seen)]
        user = trainer(epochs=1, seed=7, device=device, callbacks=callbacks)
        user.fit(sgd_task(net(), loss=nn.CrossEntropyLoss()), images(20))
        return seen

    for (x, y), (there, target) in zip(mixed("cpu"), mixed("cuda"), strict=True):
        assert there.device == target.device == CUDA
        torch.testing.assert_close(there.cpu(), x)
        torch.testing.assert_close(target.cpu(), y)


def test_memory_and_utilisation_of_the_gpu_are_in_every_record() -> None:
    """As torch says: at least what the weights take, the peak never below; a utilisation in percent."""
    pytest.importorskip("pynvml", reason='needs nvidia-ml-py: pip install "loopwright[gpu]"')
    seen: list[dict[str, float]] = []

    class Keep:
        def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
            if kind == "train":
                seen.append(dict(values))

    wide = nn.Linear(5, 200_000).to(CUDA)  # 4 MB and more
    watch = lw.Watch("gpu", "optimizer", at=lw.Event.STEP_START)
    task = lw.Supervised(wide, lambda preds, target: preds.mean(), torch.optim.SGD(wide.parameters(), lr=0.01))
    trainer(epochs=1, log_every=1, callbacks=[watch], loggers=[Keep()], device="cuda").fit(task, batches())
    assert len(seen) == 8
    for values in seen:
        assert 4.0 < values["train/gpu_memory_mb"] <= values["train/gpu_memory_peak_mb"]
        assert values["train/gpu_memory_peak_mb"] <= torch.cuda.max_memory_allocated(CUDA) / 1e6 + 1e-3
        assert 0 <= values["train/gpu_utilization"] <= 100
        assert values["train/optimizer/lr"] == pytest.approx(0.01)
