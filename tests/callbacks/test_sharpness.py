"""SAM is the loop that a person would write with two passes over each window."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import loopwright as lw
from loopwright.errors import NonFiniteError, PlanError, SettingError
from tiny import acts, classifier, line, loader, pairs, same, samples, sgd_task, trainer


def batches(n: int = 8) -> list[list[Tensor]]:
    x, y = samples(5 * n - 2)
    return [list(one) for one in zip(x.split(5), y.split(5), strict=True)]


def task(net: nn.Module, **more: Any) -> lw.Supervised:
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), **more)


def two_passes(
    net: nn.Module, data: list[Any], *, accumulate: int, clip_norm: float | None, rho: float, penalty: float = 0.0,
    bf16: bool = False,
) -> nn.Module:  # fmt: skip
    """SAM by hand. Buffers are those of the first pass; a mean over the window is a mean over its samples."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def gradients(window: list[Any]) -> None:
        optimizer.zero_grad()
        total = sum(len(y) for _, y in window)
        for x, y in window:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(net(x), y)
            if penalty:
                loss = loss + penalty * sum(p.abs().sum() for p in net.parameters())
            loss.backward(torch.tensor(len(y) / total) if len(window) > 1 else None)
        if clip_norm is not None:
            clip_grad_norm_(net.parameters(), clip_norm)

    for start in range(0, len(data), accumulate):
        window = data[start : start + accumulate]
        gradients(window)
        tensors = [*net.parameters(), *net.buffers()]
        before = [t.detach().clone() for t in tensors]
        with torch.no_grad():
            scale = rho / (get_total_norm([p.grad for p in net.parameters() if p.grad is not None]) + 1e-12)
            for p in net.parameters():
                p.add_(p.grad * scale)
        gradients(window)
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                t.copy_(value)
        optimizer.step()
    return net


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.2])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_has_the_bits_of_two_passes_by_hand(accumulate: int, clip_norm: float | None, bf16: bool) -> None:
    """SAM has the bits of two passes by hand, with dropout, batch norm and a short last window."""
    net, data = classifier(dropout=0.3, batch_norm=True), batches()
    ours = copy.deepcopy(net)
    torch.manual_seed(5)
    two_passes(net, data, accumulate=accumulate, clip_norm=clip_norm, rho=0.1, bf16=bf16)
    torch.manual_seed(5)
    settings = {"accumulate": accumulate, "clip_norm": clip_norm, "precision": "bf16" if bf16 else "fp32"}
    trainer(epochs=1, callbacks=[lw.SAM(0.1)], **settings).fit(task(ours), data)
    assert same(ours.state_dict(), net.state_dict())


def test_hooks_on_the_loss_and_batches_of_others_are_in_both_passes() -> None:
    """A penalty is a part of the objective, and both passes see the very batch that map_batch has made."""
    net, data = classifier(), batches()
    ours = copy.deepcopy(net)
    noisy = [[x + 1, y] for x, y in data]
    two_passes(net, noisy, accumulate=2, clip_norm=None, rho=0.1, penalty=0.01)
    penalty = acts(
        map_batch=lambda run, batch: [batch[0] + 1, batch[1]],
        map_loss=lambda run, loss, output, batch, phase: loss + 0.01 * sum(p.abs().sum() for p in phase.parameters()),
    )
    trainer(epochs=1, accumulate=2, callbacks=[lw.SAM(0.1), penalty]).fit(task(ours), data)
    assert same(ours.state_dict(), net.state_dict())


def test_a_known_answer_and_what_is_logged_is_of_the_first_pass() -> None:
    """The loss w**4 at 1: uphill by 0.5 is 1.5, where the slope is 4 * 1.5 ** 3."""
    net = line(1.0)
    seen: list[float] = []
    look = acts(on_grads_ready=lambda run, phase, norm: seen.append(net.weight.grad.item()))
    fourth = sgd_task(net, lr=0.1, loss=lambda preds, target: (preds**4).mean())
    run = trainer(epochs=1, callbacks=[lw.SAM(0.5), look]).fit(fourth, pairs([1.0]))
    assert seen == [pytest.approx(13.5)]
    assert net.weight.item() == pytest.approx(1 - 1.35)
    assert run.history.losses["loss"].tolist() == [1.0]


class Pair(lw.Task):
    """Two objectives that look at one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = line(1.0), line(2.0)

    def configure_optimizers(self) -> dict[str, Any]:
        return {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in (("a", self.a), ("b", self.b))}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("a", lambda batch: (self.a(batch[0]) * self.b(batch[0])).pow(2).mean(), "a", clip_norm=5.0),
            lw.Phase("b", lambda batch: (self.b(batch[0]) - self.a(batch[0])).pow(4).mean(), "b"),
        ]


@pytest.mark.parametrize("chosen", [None, "a", "b"])
def test_each_phase_goes_uphill_by_itself(chosen: str | None) -> None:
    task, rho = Pair(), 0.25
    run = trainer(epochs=1, callbacks=[lw.SAM(rho, phases=chosen)]).fit(task, pairs([1.0]))
    uphill = rho if chosen in (None, "a") else 0.0
    a = 1 - 0.1 * min(5.0, 2 * (1 + uphill) * 4)
    b = 2.0 + (rho if chosen in (None, "b") else 0.0)
    assert task.a.weight.item() == pytest.approx(a)
    assert task.b.weight.item() == pytest.approx(2 - 0.1 * 4 * (b - a) ** 3)
    assert run.progress.phase_steps == {"a": 1, "b": 1}


def test_a_second_pass_that_is_not_finite_leaves_the_weights_alone() -> None:
    """At 1 the loss is finite; uphill of it, it is not."""
    net = line(1.0)
    steep = sgd_task(net, loss=lambda preds, target: torch.where(preds > 1.1, preds * math.inf, preds**2).mean())
    with pytest.raises(NonFiniteError):
        trainer(epochs=1, callbacks=[lw.SAM(0.5)]).fit(steep, pairs([1.0]))
    assert net.weight.item() == 1.0
    with pytest.warns(lw.LoopwrightWarning, match="epoch 1 went by without an optimizer step"):
        run = trainer(epochs=1, nonfinite="skip", callbacks=[lw.SAM(0.5)]).fit(steep, pairs([1.0], [2.0]))
    assert (net.weight.item(), run.progress.step, run.skipped) == (1.0, 0, 2)


def test_an_error_in_the_second_pass_puts_the_weights_back() -> None:
    net, calls = line(1.0), []

    def loss(preds: Tensor, target: Tensor) -> Tensor:
        calls.append(preds)
        if len(calls) == 2:
            raise ZeroDivisionError
        return preds.mean()

    with pytest.raises(ZeroDivisionError):
        trainer(epochs=1, callbacks=[lw.SAM(0.5)]).fit(sgd_task(net, loss=loss), pairs([1.0]))
    assert net.weight.item() == 1.0


def test_batches_that_were_skipped_are_in_neither_pass() -> None:
    def skip(run: lw.Run, batch: Any) -> Any:
        if batch[0].shape[0] == 3:
            raise lw.SkipBatch
        return batch

    net, data = classifier(), batches()  # the last one has 3 samples
    ours = copy.deepcopy(net)
    two_passes(net, data[:-1], accumulate=2, clip_norm=None, rho=0.1)
    trainer(epochs=1, accumulate=2, callbacks=[lw.SAM(0.1), acts(map_batch=skip)]).fit(task(ours), data)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(net.parameters(), ours.parameters(), strict=True))


def test_a_step_that_was_dropped_leaves_no_batch_behind() -> None:
    def skip(run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> None:
        if run.progress.batch == 2:
            raise lw.SkipStep

    net, data = classifier(), batches(6)
    ours = copy.deepcopy(net)
    two_passes(net, [*data[:2], *data[4:]], accumulate=2, clip_norm=None, rho=0.1)
    trainer(epochs=1, accumulate=2, callbacks=[lw.SAM(0.1), acts(on_backward_end=skip)]).fit(task(ours), data)
    assert same(ours.state_dict(), net.state_dict())


def test_it_resumes_with_the_same_bits_after_every_step(folder: Path) -> None:
    def fit(seed: int, **how: Any) -> Any:
        torch.manual_seed(seed)
        net = classifier(dropout=0.3, batch_norm=True, seed=seed)
        checkpoint = lw.Checkpoint("1 step", keep=20)
        user = trainer(epochs=2, folder=folder, name="a", checkpoint=checkpoint, callbacks=[lw.SAM()], accumulate=2)
        user.fit(task(net), loader(20, batch_size=4, shuffle=True), **how)
        return net.state_dict()

    whole = copy.deepcopy(fit(1))
    paths = sorted(folder.rglob("checkpoints/step-*"))
    assert len(paths) == 6
    for path in paths[:-1]:
        assert same(fit(7, resume=path), whole)


def refused(match: str, what: Any, kind: type[Exception] = SettingError, **settings: Any) -> None:
    with pytest.raises(kind, match=match):
        trainer(epochs=1, **{"callbacks": [lw.SAM()], **settings}).fit(what, batches())


def test_what_it_cannot_do_is_refused_at_the_start() -> None:
    net = classifier()
    refused(r"gradient scaler \(precision='fp16'\).*train with precision='bf16'", task(net), precision="fp16")
    refused("SAM.phases='gen'.*main", task(net), callbacks=[lw.SAM(phases="gen")])
    lbfgs = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.LBFGS(net.parameters()))
    refused("SAM.on_grads_ready cannot apply to LBFGS", lbfgs, PlanError)
    with pytest.raises(SettingError, match="whose step moves its optimizers itself"):
        trainer(epochs=1, callbacks=[lw.SAM()]).run(lambda run, batch: 1.0, batches(), state={})
    with pytest.raises(SettingError, match=r"SAM\(rho=0\): expected a positive number"):
        lw.SAM(0)


@pytest.mark.slow
def test_parameters_that_are_shared_out_are_refused_at_the_start() -> None:
    def fit() -> None:
        made = lw.Supervised(classifier(), nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1))
        trainer(epochs=1, strategy="fsdp", callbacks=[lw.SAM()]).fit(made, samples(20))

    with pytest.raises(PlanError, match="SAM cannot go over the window again with FSDP; train with strategy='ddp'"):
        lw.launch(fit, 2)


def two(*callbacks: Any, stages: Any = None) -> list[str]:
    net = line()
    length = {} if stages else {"epochs": 1}
    return trainer(**length, callbacks=callbacks).plan(sgd_task(net), pairs([1.0]), stages=stages).problems


def test_two_for_one_phase_are_refused() -> None:
    told = (
        "two SAM go uphill for the phase 'main', and what the first has found is lost in the second; leave one out, or "
        "say which phases each is for: lw.SAM(phases=...)"
    )
    one, other = lw.SAM(0.5), lw.SAM(0.5, phases="main")
    assert two(one, other) == [told]
    assert two(lw.SAM(), stages=[lw.Stage("a", "1 epoch", callbacks=[lw.SAM()])]) == [told]
    assert two(stages=[lw.Stage("a", "1 epoch", callbacks=[lw.SAM(), lw.SAM()])]) == [told]
    assert two(stages=[lw.Stage(name, "1 epoch", callbacks=[lw.SAM()]) for name in "ab"]) == []


def test_one_for_each_phase_may_be() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = line(), line()

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(n, lambda batch, n=n: getattr(self, n)(batch[0]).mean(), optimizers=n) for n in "ab"]

        def configure_optimizers(self) -> Any:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), 0.1) for n in "ab"}

    both = [lw.SAM(0.5, phases="a"), lw.SAM(0.1, phases="b")]
    assert trainer(epochs=1, callbacks=both).plan(Two(), pairs([1.0])).problems == []
