"""The recipe of docs/fsdp.md: layers cut over ranks that see the same samples, and data parallelism beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.parallel import local

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "fsdp.md"
X = torch.randn(81, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
Fitted = tuple[lw.Run, nn.Module]


def block(start: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [one for one in blocks if start in one]
    return str(code)


def page() -> dict[str, Any]:
    """The strategy, the network and its plan, as docs/fsdp.md prints them."""
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "lw": lw}
    exec(block("class TensorParallel"), scope)
    exec(block("class Block").partition("\n\ndef train")[0], scope)
    return scope


def fit(strategy: Any, dropout: float = 0.0, *, resume: Any = None, metrics: Any = None, **settings: Any) -> Fitted:
    torch.manual_seed(0)
    net = page()["Stack"](dropout)
    metrics = {"accuracy": lw.metrics.Accuracy()} if metrics is None else metrics
    task = lw.Supervised(net, nn.CrossEntropyLoss(), lambda p: torch.optim.AdamW(p, lr=1e-2), metrics=metrics)
    chosen = {"epochs": 3, "clip_norm": 0.1, "folder": None, "progress": False, "strategy": strategy} | settings
    trainer = lw.Trainer(**chosen)
    return trainer.fit(task, lw.Loader((X, Y), 16, shuffle=True), (X[:50], Y[:50]), resume=resume), net


def two_by(size: int) -> Any:
    scope = page()
    return scope["TensorParallel"](size, scope["PLAN"])


def told(fitted: Fitted) -> dict[str, Any]:
    run, net = fitted
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "metrics": dict(run.metrics),
        "losses": run.history["train/loss"],
        "progress": (run.progress.samples, run.progress.step),
        "skipped": run.skipped,
    }


def check_close(found: dict[str, Any], wanted: dict[str, Any], bound: float = 1e-6) -> None:
    torch.testing.assert_close(found["weights"], wanted["weights"], atol=bound, rtol=0)
    assert found["metrics"] == pytest.approx(wanted["metrics"], abs=bound)
    assert found["progress"] == wanted["progress"]


def check_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())
    assert {**found, "weights": 0} == {**wanted, "weights": 0}


def test_the_recipe_has_at_most_40_lines() -> None:
    lines = [line for line in block("class TensorParallel").splitlines() if line.strip()]
    assert len(lines) <= 40


class Seen(lw.Callback):
    """The samples that this rank is given, by step."""

    def on_fit_start(self, run: lw.Run) -> None:
        self.steps: list[list[Tensor]] = []

    def on_step_start(self, run: lw.Run) -> None:
        self.steps.append([])

    def on_batch_start(self, run: lw.Run, batch: Any) -> None:
        self.steps[-1].append(batch[0].clone())


@pytest.mark.capability("IG-22", "CA-05")
@pytest.mark.parametrize(("world", "parts"), [(4, 2), pytest.param(2, 1, marks=pytest.mark.nightly)])
def test_two_by_two_ranks_train_to_the_weights_of_one_process(world: int, parts: int) -> None:
    """Tensor parallel by DTensor, beside data parallel, in a recipe of 40 lines: the numbers of one process."""

    def cases(strategy: Any) -> Any:
        plain = Seen()
        found = [told(fit(strategy, callbacks=[plain])), told(fit(strategy, accumulate=4, clip_norm=None))]
        return found, plain.steps

    (alone, batches), *_ = lw.launch(cases, 1, "single")
    ranks = lw.launch(cases, world, two_by(2))
    for found, _ in ranks:
        for one, wanted in zip(found, alone, strict=True):
            check_close(one, wanted)
            assert one["losses"] == pytest.approx(wanted["losses"], abs=1e-6)
    for step, whole in enumerate(batches):
        given = [seen[step] for _, seen in ranks]
        for low in range(0, world, 2):  # the two of a group
            assert all(map(torch.equal, given[low], given[low + 1]))
        held = [batch for one in given[::2] for batch in one if len(whole[0]) >= parts]
        assert not held or torch.equal(torch.cat(held), whole[0])


@pytest.mark.capability("CA-05")
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    """Tensor parallel, stopped within an epoch, with dropout, which is drawn alike by the ranks of a group."""
    how: dict[str, Any] = {"name": "cut", "dropout": 0.2, "accumulate": 2, "checkpoint": lw.Checkpoint(every="4 steps")}

    def cases() -> Any:
        strategy = two_by(2)
        whole = told(fit(strategy, **how, folder=tmp_path / "whole"))
        fit(strategy, **how, folder=tmp_path / "cut", steps=5, epochs=None)
        return whole, told(fit(strategy, **how, folder=tmp_path / "cut", resume="auto"))

    ranks = lw.launch(cases, 4)
    for whole, resumed in ranks:
        check_equal(resumed, whole)
        check_equal(whole, ranks[0][0])  # weights that are not cut would part if two ranks of a group drew differently
    (path,) = (tmp_path / "whole").glob("cut/*")
    net = page()["Stack"]()
    lw.load_weights(net, path)
    assert all(torch.equal(value, ranks[0][0]["weights"][name]) for name, value in net.state_dict().items())


def test_other_numbers_of_ranks_go_on_from_its_checkpoints_and_it_from_theirs(tmp_path: Path) -> None:
    """What had been measured of an epoch by then counts once, whoever goes on; some layers are not in the plan."""
    unclipped: dict[str, Any] = {"folder": tmp_path, "clip_norm": None, "epochs": 2}

    def half(strategy: Any, name: str) -> None:
        saving = lw.Checkpoint(every="4 steps")
        fit(strategy, name=name, **{**unclipped, "epochs": None}, steps=9, checkpoint=saving)

    def rest(strategy: Any, name: str, how: str = "approximate") -> Any:
        newest = max((tmp_path / name).glob("*/checkpoints/step-*"))
        resume = lw.Resume(newest, how=how)  # type: ignore[arg-type]
        return told(fit(strategy, name=name, **unclipped, checkpoint=False, resume=resume))

    def partly() -> Any:
        strategy = two_by(2)
        strategy.plan = {name: style for name, style in strategy.plan.items() if name != "out"}
        return strategy

    def alone() -> Any:
        half("single", "one")
        return told(fit("single", clip_norm=None, epochs=2))

    def four() -> Any:
        half(partly(), "groups")
        half(lw.FSDP(), "fsdp")
        with pytest.raises(lw.CheckpointError, match=r"ranks was '4, for 2 parts of the data' and is 4"):
            rest(lw.FSDP(), "groups", "exact")
        return rest(lw.FSDP(), "groups"), rest(partly(), "one"), rest(partly(), "fsdp")

    (wanted,) = lw.launch(alone, 1)
    for from_groups, from_one, from_fsdp in lw.launch(four, 4):
        check_close(from_groups, wanted, 1e-5)
        check_close(from_one, wanted, 1e-5)
        check_close(from_fsdp, wanted, 1e-5)
    (from_groups,) = lw.launch(rest, 1, "single", "groups")
    check_close(from_groups, wanted, 1e-5)


class Spoils(lw.Callback):
    """One gradient that is not finite, on one rank."""

    def on_backward_end(self, run: lw.Run, *args: Any) -> None:
        if run.comm.rank == 3 and run.progress.step == 2 and not run.skipped:
            grad = next(p.grad for p in run.models["model"].parameters() if p.grad is not None)
            local(grad).fill_(torch.nan)


class Asks(lw.Callback):
    """What the ranks tell one another; a stop that one asks for."""

    def on_fit_start(self, run: lw.Run) -> None:
        every, parts = run.comm, run.team.comm
        self.counts = every.world_size, every.sum(1.0), parts.sum(1.0), parts.gather(every.rank)

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        if run.comm.rank == 1 and run.progress.step == 4:
            run.request_stop("rank 1 has had enough")


def test_a_gradient_and_a_stop_of_one_rank_are_those_of_all() -> None:
    """A step that one rank finds not finite is skipped by all, and a wish to stop is heard from each."""

    def cases() -> Any:
        asks = Asks()
        spoiled = told(fit(two_by(2), callbacks=[Spoils()], nonfinite="skip", clip_norm=None))
        return spoiled, told(fit(two_by(2), callbacks=[asks])), asks.counts

    ranks = lw.launch(cases, 4)
    for spoiled, stopped, counts in ranks:
        assert spoiled["skipped"] == 1
        check_equal(spoiled, ranks[0][0])
        assert 5 <= stopped["progress"][1] <= 6
        assert stopped["progress"] == ranks[0][1]["progress"]
        assert counts == (4, 4.0, 2.0, [0, 2])


def test_the_model_is_plain_at_the_end_and_can_be_used_again() -> None:
    def used() -> Any:
        _, alone = fit("single", epochs=1)
        blank = {name: sorted(vars(module)) for name, module in alone.named_modules()}
        _, net = fit(two_by(2), epochs=1)
        assert {name: sorted(vars(module)) for name, module in net.named_modules()} == blank
        assert all(type(p) is nn.Parameter for p in net.parameters())
        assert not any(held for module in net.modules() for name, held in vars(module).items() if "_hooks" in name)
        trainer = lw.Trainer(epochs=1, strategy=two_by(2), folder=None, progress=False)
        again = lw.Supervised(net, nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1))
        trainer.fit(again, (X, Y))
        return net(X).detach(), trainer.predict(again, X), trainer.validate(again, (X, Y))

    for mine, predicted, measured in lw.launch(used, 4):
        torch.testing.assert_close(predicted, mine)
        assert measured["valid/loss"] == pytest.approx(float(nn.functional.cross_entropy(mine, Y)))


@pytest.mark.parametrize(
    ("part", "world", "text"),
    [
        (lambda rank: (rank, 2), 3, "told (part, parts) = (0, 2), (1, 2), (2, 2) on ranks 0, 1, ...; expected each"),
        (lambda rank: (min(rank, 1), 2), 3, "told (part, parts) = (0, 2), (1, 2), (1, 2) on ranks 0, 1, ...; expected"),
        (
            lambda rank: (int(rank < 2), 2),
            4,
            "= (1, 2), (1, 2), (0, 2), (0, 2) on ranks 0, 1, ...; expected each part "
            "from 0 up to parts equally often, part 0 first, then part 1 and so on, such as (0, 2), (0, 2), (1, 2)",
        ),
    ],
)
def test_parts_that_do_not_add_up_are_refused(part: Callable[[int], Any], world: int, text: str) -> None:
    class Wrong(lw.DDP):
        def data_part(self, device: torch.device, world_size: int) -> Any:
            return part(torch.distributed.get_rank())

    with pytest.raises(lw.SettingError, match=re.escape(text)):
        lw.launch(lambda: fit(Wrong()) and None, world)


def test_a_metric_that_would_count_samples_twice_is_refused() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.MulticlassAccuracy(2)
    with pytest.raises(lw.SettingError, match=r"metric 'accuracy' \(MulticlassAccuracy\) is joined over all ranks by"):
        lw.launch(lambda: fit(two_by(2), metrics={"accuracy": metric}) and None, 4)
