"""What goes wrong with several ranks is said with the fix, on all of them; two forked processes each."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import loopwright as lw
from loopwright.parallel import Ranks, comm
from loopwright.parallel.comm import _packed

pytestmark = pytest.mark.slow

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def supervised(net: nn.Module | None = None, **more: Any) -> lw.Supervised:
    net = net or nn.Linear(4, 2)
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), **more)


def trainer(**settings: Any) -> lw.Trainer:
    return lw.Trainer(**({"epochs": 2, "folder": None, "progress": False, "seed": 0} | settings))


def weights(net: nn.Module) -> list[Any]:
    return [p.detach().clone() for p in net.parameters()]


class Two(nn.Module):
    """Only one of its parts is reached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.left_out = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_parameters_that_a_step_does_not_reach_are_named() -> None:
    with pytest.raises(
        lw.SettingError, match=r"2 of the parameters that are trained got no gradient .*left_out.weight"
    ):
        lw.launch(lambda: trainer(strategy=lw.DDP(timeout=5)).fit(supervised(Two()), (X, Y)) and None, 2)


def test_parameters_that_a_step_does_not_reach_may_be_allowed() -> None:
    def fit() -> Any:
        net = Two()
        trainer(strategy=lw.DDP(find_unused=True)).fit(supervised(net), (X, Y))
        return weights(net.used)

    first, second = lw.launch(fit, 2)
    assert all(map(torch.equal, first, second))


class Skips(lw.Callback):
    """One step is left out, since rank 1 wants so from one place of it, or all ranks want so before it."""

    def __init__(self, place: str) -> None:
        self.place = place

    def skip(self, run: lw.Run, place: str) -> None:
        if place == self.place and run.progress.batch == 2 and (place == "on_step_start" or run.comm.rank == 1):
            raise lw.SkipStep

    def on_step_start(self, run: lw.Run) -> None:
        self.skip(run, "on_step_start")

    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        self.skip(run, "map_loss")
        return loss

    def on_backward_end(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> None:
        self.skip(run, "on_backward_end")


def test_one_rank_may_leave_a_step_out_from_wherever_in_it_with_buffers_of_rank_0() -> None:
    """Each rank must send as the others: buffers in the first forward of a window, gradients in its last backward."""

    def fits() -> Any:
        found = []
        for place, accumulate in product(("on_step_start", "map_loss", "on_backward_end"), (1, 2)):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
            net.register_buffer("more", torch.ones(3))
            one = trainer(epochs=1, accumulate=accumulate, strategy=lw.DDP(timeout=8), callbacks=[Skips(place)])
            run = one.fit(supervised(net), lw.Loader((X, Y), 10))
            found.append((run.progress.step, weights(net)))
        return found

    ranks = lw.launch(fits, 2)
    wanted = ranks[0][:2] * 3
    for (steps, moved), (expected, same) in [*zip(ranks[0], wanted, strict=True), *zip(ranks[1], wanted, strict=True)]:
        assert steps == expected in (1, 3)
        assert all(map(torch.equal, moved, same))


class Drops(lw.Callback):
    """Drops the third step, after its gradients are there, on rank 1 alone."""

    def __init__(self) -> None:
        self.seen = 0

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        self.seen += 1
        if self.seen == 3 and run.comm.rank == 1:
            raise lw.SkipStep


@pytest.mark.parametrize("settings", [{"epochs": 3}, {"epochs": 3, "log_every": 4}, {"steps": 4}, {"steps": 11}])
def test_a_step_that_one_rank_alone_has_dropped_ends_the_run_by_the_next_record(settings: Any) -> None:
    """After the gradients nobody waits for the others: weights would drift apart, and the run would end in order."""

    def fit() -> None:
        trainer(**settings, callbacks=[Drops()]).fit(supervised(), lw.Loader((X, Y), 10))

    with pytest.raises(lw.LoopwrightError, match=r"the same steps: 4 on rank 0, 3 on rank 1\. .*SkipStep"):
        lw.launch(fit, 2)


class ByItself(Sampler[int]):
    """Draws from a generator that is seeded by nobody."""

    def __iter__(self) -> Any:
        order = list(range(40))
        random.SystemRandom().shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 40


def test_ranks_that_read_different_orders_are_told_so() -> None:
    def fit() -> None:
        data = DataLoader([(x, y) for x, y in zip(X, Y, strict=True)], 8, sampler=ByItself())
        trainer().fit(supervised(), data)

    with pytest.raises(lw.DataError, match="in epoch 1 each rank has read an order of its own"):
        lw.launch(fit, 2)


def test_an_optimizer_that_calls_back_needs_one_process() -> None:
    def fit() -> None:
        net = nn.Linear(4, 2)
        optimizer = torch.optim.LBFGS(net.parameters())
        trainer(nonfinite=None).fit(lw.Supervised(net, nn.CrossEntropyLoss(), optimizer), (X, Y))

    with pytest.raises(lw.SettingError, match="LBFGS"):
        lw.launch(fit, 2)


class NoMerge:
    """A metric that sees one rank's part and cannot be joined with another."""

    def update(self, preds: Any, target: Any) -> None: ...
    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


def test_a_metric_that_cannot_be_joined_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"metric 'odd' \(NoMerge\) sees a part of the data on each rank"):
        lw.launch(lambda: trainer().fit(supervised(metrics={"odd": NoMerge()}), (X, Y)) and None, 2)


def test_groups_that_are_added_and_layers_that_are_freed_in_between_are_joined_as_well() -> None:
    def fit() -> Any:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        optimizer = torch.optim.SGD(net[1].parameters(), 0.1)

        class Free(lw.Callback):
            def on_epoch_end(self, run: lw.Run) -> None:
                if run.progress.epoch == 1:
                    net[0].requires_grad_(True)
                    optimizer.add_param_group({"params": list(net[0].parameters())})

        torch.manual_seed(5)
        for p in net.parameters():
            nn.init.normal_(p)
        before = weights(net)
        trainer(callbacks=[Free()]).fit(lw.Supervised(net, nn.CrossEntropyLoss(), optimizer), (X, Y))
        return before, weights(net)

    (before, first), (_, second) = lw.launch(fit, 2)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(before[0], first[0])


def test_replacing_the_model_keeps_the_ranks_together() -> None:
    def fit() -> Any:
        task = supervised()

        class Swap(lw.Callback):
            def on_epoch_end(self, run: lw.Run) -> None:
                if run.progress.epoch == 1:
                    net = nn.Linear(4, 2)  # other weights on each rank: those of rank 0 count
                    run.replace("model", net)
                    run.replace("optimizer", torch.optim.SGD(net.parameters(), 0.1))

        trainer(callbacks=[Swap()]).fit(task, (X, Y))
        return weights(task.module)

    first, second = lw.launch(fit, 2)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strategy": "dpp"}, "strategy='dpp' is unknown. .*Did you mean 'ddp'"),
        ({"strategy": lw.DDP}, "expected 'auto', 'ddp'"),
        ({"devices": 2}, "devices=2, but 1 process was started here"),
        ({"nodes": 2}, "nodes=2, but 1 machine takes part"),
    ],
)
def test_settings_of_ranks_are_checked(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(lw.SettingError, match=told):
        trainer(**settings).fit(supervised(), (X, Y))


class Module(lw.DataModule):
    """Notes in which processes it was prepared and set up."""

    def __init__(self, folder: Path, rank: Any) -> None:
        self.folder, self.rank = folder, rank

    def prepare_data(self) -> None:
        self.prepared = True
        with (self.folder / "log").open("a") as file:
            file.write(f"prepare {self.rank()}\n")

    def setup(self) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(f"setup {self.rank()}\n")

    def train_data(self) -> Any:
        return DataLoader(TensorDataset(X, Y), 8, shuffle=True)

    def test_data(self) -> Any:
        return X, Y


@pytest.mark.capability("PL-24")
def test_data_is_prepared_once_and_set_up_in_every_process(tmp_path: Path) -> None:
    def fit() -> Any:
        module = Module(tmp_path, lambda: torch.distributed.get_rank())
        task = supervised()
        trainer().fit(task, module)
        return hasattr(module, "prepared"), trainer().test(task, module)

    (first, measured), (second, same) = lw.launch(fit, 2)
    assert (first, second) == (True, False)  # what prepare_data sets reaches no other process
    assert measured == same
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[:3]) == ["prepare 0", "setup 0", "setup 1"]
    assert lines[0] == "prepare 0"  # before anybody sets up
    assert lines.count("prepare 0") == 2  # for the fit, and for the test
    assert "prepare 1" not in lines


def test_one_folder_is_written_by_rank_0_alone(tmp_path: Path) -> None:
    def fit() -> Any:
        run = trainer(folder=tmp_path, name="n").fit(supervised(), (X, Y), (X, Y))
        return str(run.folder), len(run.loggers), run.metrics

    (first, loggers, metrics), (second, none, same) = lw.launch(fit, 2)
    assert first == second
    assert (loggers, none) == (1, 0)
    assert metrics == same
    assert [path.name for path in (tmp_path / "n").iterdir()] == [Path(first).name]
    record = json.loads((Path(first) / "run.json").read_text())
    assert record["status"] == "done"
    assert [sorted(rank) for rank in record["ranks"]] == [["forward", "waited"]] * 2


def test_a_rank_that_raises_ends_the_run_as_failed_and_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Bad(lw.Callback):
        def on_step_end(self, run: lw.Run, result: Any) -> None:
            if run.comm.rank == 1 and run.progress.step == 3:
                raise ValueError("a bad day")

    def fit() -> None:
        data = DataLoader(TensorDataset(X, Y), 8)
        strategy = lw.DDP(timeout=6)
        trainer(folder=tmp_path, name="n", epochs=100, callbacks=[Bad()], strategy=strategy).fit(supervised(), data)

    with pytest.raises(ValueError, match="a bad day"):
        lw.launch(fit, 2)
    assert "rank 1 failed at step" in capfd.readouterr().err
    (folder,) = (tmp_path / "n").iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("lasting", [0.0, 0.03])
def test_a_stop_that_one_rank_asks_for_takes_effect_on_all_after_the_same_step(lasting: float) -> None:
    """However often the ranks tell one another what time it is."""

    class Stops(lw.Callback):
        def on_step_end(self, run: lw.Run, result: Any) -> None:
            time.sleep(lasting)
            if run.progress.step == 5 and run.comm.rank == 1:
                run.request_stop("enough")

    def fit() -> Any:
        run = trainer(callbacks=[Stops()], epochs=9).fit(supervised(), lw.Loader((X, Y), 4))
        return run.progress.step, run.stop_reason

    assert lw.launch(fit, 2) == [(7, "enough")] * 2


def test_all_ranks_see_one_clock_and_end_by_it_at_the_same_step() -> None:
    def fit() -> Any:
        run = trainer(epochs=None, time="1 sec").fit(supervised(), lw.Loader((X, Y), 4))
        return run.progress.step, run.progress.seconds

    first, second = lw.launch(fit, 2)
    assert first == second
    assert first[0] > 10
    assert first[1] >= 1


class Halts(Dataset[Any]):
    """Item 300 lasts as long as a validation or a checkpoint may."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        if index == 300:
            time.sleep(0.5)
        return X[index % 40], Y[index % 40]


@pytest.mark.parametrize("part", ["train", "valid"])
def test_what_lasts_once_counts_once_for_the_clock(part: str) -> None:
    """Between two messages of rank 0 all guess its clock by what steps have taken before."""

    def fit() -> Any:
        began = time.perf_counter()
        quick = lw.Loader((X.repeat(10, 1), Y.repeat(10)), 4)
        train, valid = (DataLoader(Halts(), 4), None) if part == "train" else (quick, DataLoader(Halts(), 400))
        run = trainer(epochs=3).fit(supervised(), train, valid=valid)
        return run.progress.seconds, time.perf_counter() - began

    for told, wall in lw.launch(fit, 2):
        assert 0.9 < told < wall


@pytest.mark.parametrize("size", [1, 1_000, 1_016, 1_017, 32_760, 32_761, 100_000])
def test_what_is_told_among_ranks_may_have_any_length(size: int) -> None:
    def tell() -> Any:
        torch.distributed.init_process_group("gloo")
        comm = Ranks()
        mine = bytes([comm.rank]) * (size if comm.rank else 1)
        return comm.gather(mine), comm.broadcast(bytes(size)), comm.broadcast(torch.arange(size)).sum().item()

    told = [b"\0", b"\1" * size], bytes(size), size * (size - 1) // 2
    assert lw.launch(tell, 2) == [told] * 2


class Draws(torch.optim.lr_scheduler.LambdaLR):
    """Uses up random numbers at the end of each epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, lambda epoch: 0.5 + torch.rand(()).item())


class Rolls:
    """A logger that uses up others."""

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        random.random()
        torch.rand(())


@pytest.mark.parametrize("by", ["scheduler", "logger", "nothing"])
def test_the_order_of_each_epoch_is_that_of_one_process_whatever_draws_between(by: str) -> None:
    """Ranks may be told ahead with which random numbers rank 0 opens the next epoch."""

    def fit() -> Any:
        seen: list[int] = []

        class Noted(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                seen.extend(x[:, 0].int().tolist())
                return super().forward(x)

        torch.manual_seed(0)
        net = Noted(1, 2)
        sgd = torch.optim.SGD(net.parameters(), 0.01)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=Draws(sgd) if by == "scheduler" else None)
        data = TensorDataset(torch.arange(12.0).unsqueeze(1), torch.zeros(12, dtype=torch.long))
        user = trainer(epochs=4, loggers=[Rolls()] if by == "logger" else [])
        run = user.fit(task, DataLoader(data, 4, shuffle=True))
        return seen, run.team is not None and run.team.asks

    (first, asks), (second, _) = lw.launch(fit, 2)
    assert asks == (by == "logger")
    both = [x for n in range(0, 24, 2) for x in (*first[n : n + 2], *second[n : n + 2])]
    alone, _ = fit()
    assert both == alone
    assert len({tuple(alone[n : n + 12]) for n in range(0, 48, 12)}) == 4


def test_what_is_logged_after_the_last_record_has_one_of_its_own() -> None:
    def fit() -> Any:
        kept = Kept()
        user = trainer(epochs=2, loggers=[kept])
        user.on(lw.Event.EPOCH_END)(lambda run: run.log({"mine": float(run.progress.epoch)}))
        user.fit(supervised(), lw.Loader((X, Y), 8))
        return kept.told

    assert lw.launch(fit, 2)[0] == fit() == [1.0, 2.0]


class Pair(lw.Task):
    """The second of its phases steps every third time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def configure_optimizers(self) -> Any:
        return {"a": torch.optim.SGD(self.a.parameters(), 0.1), "b": torch.optim.SGD(self.b.parameters(), 0.1)}

    def phases(self) -> Any:
        return [lw.Phase("a", self.loss_of(self.a), "a"), lw.Phase("b", self.loss_of(self.b), "b", every=3)]

    def loss_of(self, net: nn.Module) -> Any:
        def step(batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(net(batch[0]), batch[1])

        return step


@pytest.mark.parametrize("lone", [True, False])
def test_losses_are_those_of_one_process_also_of_phases_that_rest_and_beside_what_is_logged(lone: bool) -> None:
    def fit() -> Any:
        user = trainer(log_every=2)

        @user.on(lw.Event.STEP_END)
        def _(run: lw.Run) -> None:
            if not lone or run.comm.rank == 0:
                run.log({"mine": 1.0, "my/loss": 5.0})

        run = user.fit(Pair(), lw.Loader((X, Y), 7))
        return {name: list(found) for name, found in run.history.losses.items()}, run.history["train/my/loss"]

    both, one = lw.launch(fit, 2), fit()
    assert [*one[0]] == ["a/loss", "b/loss"]
    assert [len(found) for found in one[0].values()] == [12, 4]
    for losses, logged in both:
        assert logged == one[1] == [5.0, 5.0]
        assert [*losses] == [*one[0]]
        for name, found in losses.items():
            assert found == pytest.approx(one[0][name], abs=1e-6)


class Kept:
    """What is logged as ``train/mine``, in records of steps."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        if kind == "train" and "train/mine" in values:
            self.told.append(values["train/mine"])


class Slows(Dataset[Any]):
    """After 84 steps they take 0.05 s; in step 123, this process is asked to end if it is rank 0."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        self.read += 1  # by each rank one sample a step
        if self.read > 84:
            time.sleep(0.05)
        if self.read == 123 and torch.distributed.get_rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        return X[index], Y[index]


def test_a_signal_is_heard_soon_where_epochs_are_short_and_steps_have_become_slow() -> None:
    def fit() -> Any:
        task = supervised()
        with pytest.raises(SystemExit):
            trainer(epochs=12).fit(task, DataLoader(Slows(), 2))
        return task._run.progress.step

    first, second = lw.launch(fit, 2)
    assert first == second
    assert 122 <= first <= 128  # 132 would be the end of the epoch


def test_tensors_of_any_kind_are_told_among_ranks_as_they_are() -> None:
    kinds = {
        "half": torch.randn(3, 4).bfloat16(),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "turned": torch.randn(3, 4).t(),
        "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "part": torch.arange(1_000_000)[5:8],
        "trained": nn.Parameter(torch.ones(2)),
    }
    other = {"default": defaultdict(lambda: 0, a=1), "proxy": MappingProxyType({"a": 2})}  # which pickle refuses

    def tell() -> Any:
        torch.distributed.init_process_group("gloo")
        ranks = Ranks()
        return [list(ranks.gather({"all": [kinds]})[1]["all"][0].items()), ranks.gather(other)]

    (tensors, others), _ = lw.launch(tell, 2)
    assert others == [{"default": {"a": 1}, "proxy": {"a": 2}}] * 2
    for name, told in tensors:
        assert (told.dtype, told.layout, told.requires_grad) == (kinds[name].dtype, kinds[name].layout, False)
        assert torch.equal(told.to_dense(), kinds[name].detach().to_dense())
    assert len(_packed(kinds["part"])) < 1000  # without what it is a part of


def test_ranks_begin_with_every_tensor_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are bundled."""

    def follow() -> Any:
        torch.distributed.init_process_group("gloo")
        ranks = Ranks()
        torch.manual_seed(ranks.rank)
        kinds = [torch.float32, torch.float32, torch.float64, torch.float32, torch.int64]
        tensors = [(10 * torch.randn(size, 3)).to(kind) for size in (0, 1, 50, 4, 3, 400, 2, 0, 7) for kind in kinds]
        for alone in (torch.randn(4, 5).t(), torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last)):
            ranks.broadcast_tensors([alone])
            tensors.append(alone)
        tensors += [torch.randn(4, 5).t(), torch.tensor(float(ranks.rank)), nn.Parameter(torch.randn(3))]
        ranks.broadcast_tensors(iter(tensors))
        return [t.detach().clone() for t in tensors]

    monkeypatch.setattr(comm, "_BUNDLE", 1024)
    first, second = lw.launch(follow, 2)
    assert len(first) == 50
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def test_three_ranks_go_on_with_the_order_in_which_gradients_are_summed(tmp_path: Path) -> None:
    """DDP lays its buckets out anew after its first backward, and with that each sum of three numbers."""

    def fit() -> Any:
        found = []
        for folder, steps in (("whole", [8]), ("parts", [3, 8])):
            for last in steps:
                net = deep()
                saver = lw.Checkpoint(1, keep=2)
                one = trainer(epochs=None, steps=last, folder=tmp_path / folder, name="n", checkpoint=saver)
                run = one.fit(supervised(net), lw.Loader((X, Y), 8, shuffle=True), resume="auto")
            found.append((run.progress.step, weights(net)))
        return found

    for whole, parts in lw.launch(fit, 3):
        assert whole[0] == parts[0] == 8
        assert all(map(torch.equal, whole[1], parts[1]))


def test_a_callback_that_only_one_rank_has_holds_nobody_up() -> None:
    class Looks(lw.Callback):
        def map_loss(self, run: lw.Run, loss: Any, *args: Any) -> Any:
            return loss

    def fit() -> Any:
        import os

        first = os.environ["RANK"] == "0"
        net = deep()
        trainer(callbacks=[Looks()] if first else []).fit(supervised(net), (X, Y))
        return weights(net)

    one, two = lw.launch(fit, 2)
    assert all(map(torch.equal, one, two))


def test_a_signal_just_before_a_validation_of_which_a_rank_has_no_part() -> None:
    class Asks(lw.Callback):
        def on_step_end(self, run: lw.Run, result: Any) -> None:
            if run.progress.step == 4 and run.comm.rank == 1:
                run.request_stop("SIGTERM")  # is known to all after step 6

    def fit() -> Any:
        with pytest.raises(SystemExit) as caught:
            trainer(callbacks=[Asks()], validate_every=6).fit(supervised(), lw.Loader((X, Y), 4), (X[:3], Y[:3]))
        return caught.value.code

    assert lw.launch(fit, 2) == [143, 143]
