"""A loss or gradient that is not finite never reaches the parameters; optimizers that call back; number formats."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright._compat import any_nonfinite
from tiny import acts, bits, classifier, line, loader, pairs, same, samples, seed_all, sgd_task, trainer

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
}


class Bad(torch.autograd.Function):
    """1 forward, NaN backward: a finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * NAN


def spoiled(kind: str) -> Any:
    """A loss that is spoiled in the batch whose target is 1."""

    def loss(preds: Tensor, target: Tensor) -> Tensor:
        mean = (preds**2).mean()
        if not target.any():
            return mean
        return {"nan": mean * NAN, "inf": mean * INF, "gradient": Bad.apply(mean)}[kind]  # type: ignore[no-any-return]

    return loss


def batches(*spoiled_at: int) -> list[Any]:
    return [(torch.tensor([[float(i + 1)]]), torch.full((1, 1), float(i in spoiled_at))) for i in range(4)]


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_that_is_not_finite_raises_and_touches_nothing(kind: str, name: str, clip_norm: float | None) -> None:
    net, reference = line(1.0, bias=0.5), line(1.0, bias=0.5)
    optimizer, by_hand = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](reference.parameters())
    trainer(epochs=1, clip_norm=clip_norm).fit(lw.Supervised(reference, spoiled(kind), by_hand), batches()[:2])
    with pytest.raises(lw.NonFiniteError) as caught:
        trainer(epochs=1, clip_norm=clip_norm).fit(lw.Supervised(net, spoiled(kind), optimizer), batches(2))
    assert same(bits(net, optimizer), bits(reference, by_hand))
    text = str(caught.value)
    assert text.startswith("phase 'main' has a loss of ")
    assert "at step 3" in text
    assert "gradients not finite: weight, bias" in text
    assert text.endswith(
        "The parameters are those of before this step. Look for a learning rate too high, log or division of 0, or bad "
        'input; nonfinite="skip" leaves such steps out, nonfinite=None trains on'
    )


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_leaves_the_step_out_as_if_its_batch_were_not_there(kind: str, name: str) -> None:
    ends = []
    for data, setting in ((batches(2), "skip"), ([*batches()[:2], batches()[3]], "raise")):
        net = line(1.0, bias=0.5)
        optimizer = OPTIMIZERS[name](net.parameters())
        task = lw.Supervised(net, spoiled(kind), optimizer)
        run = trainer(epochs=1, nonfinite=setting).fit(task, data)
        ends.append((*bits(net, optimizer), run.progress.step, run.progress.samples, dict(run.metrics)))
        assert run.skipped == (setting == "skip")
    assert same(*ends)


def test_so_many_steps_in_a_row_may_be_skipped_and_no_more() -> None:
    def fit(*spoiled_at: int) -> lw.Run:
        return trainer(epochs=1, nonfinite="skip 2").fit(sgd_task(line(1.0), loss=spoiled("nan")), batches(*spoiled_at))

    assert fit(0, 1, 3).skipped == 3
    with pytest.raises(lw.NonFiniteError, match=r"at step 1; .*\(3 steps in a row; at most 2 may be skipped\)"):
        fit(0, 1, 2)


def test_none_trains_on() -> None:
    net = line(1.0)
    run = trainer(epochs=1, nonfinite=None).fit(sgd_task(net, loss=spoiled("nan")), batches(2))
    assert run.progress.step == 4
    assert net.weight.isnan().all()


def test_one_bad_batch_spoils_its_window() -> None:
    net = line(1.0)
    run = trainer(epochs=1, nonfinite="skip", accumulate=2).fit(sgd_task(net, loss=spoiled("nan"), lr=0.1), batches(0))
    assert (run.skipped, run.progress.step, run.progress.batch, run.progress.epoch) == (1, 1, 0, 1)
    assert net.weight.item() == pytest.approx(1.0 - 0.1 * (2 * 9 + 2 * 16) / 2)


def test_bad_input_is_found() -> None:
    with pytest.raises(lw.NonFiniteError, match="has a loss of nan at step 2"):
        trainer(epochs=1).fit(sgd_task(line(1.0), loss=nn.MSELoss(), lr=0.01), pairs([1], [NAN]))


def test_the_batches_of_a_bad_window_are_told() -> None:
    with pytest.raises(lw.NonFiniteError, match="has a loss of nan at step 2, in one of batches 3 to 4 of epoch 1;"):
        trainer(epochs=1, accumulate=2).fit(sgd_task(line(1.0), loss=spoiled("nan"), lr=0.1), batches(2))


def test_a_bad_phase_drops_its_own_step_and_values() -> None:
    first, second = line(1.0), line(1.0)

    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def configure_optimizers(self) -> Any:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), 1.0) for n in ("first", "second")}

        def phases(self) -> list[lw.Phase]:
            return [
                lw.Phase("first", lambda b: self.first(b[0]).mean(), optimizers="first"),
                lw.Phase("second", lambda b: spoiled("nan")(self.second(b[0]), b[1]), optimizers="second"),
            ]

    run = trainer(epochs=1, nonfinite="skip").fit(Two(), batches(0)[:2])
    assert run.progress.phase_steps == {"first": 2, "second": 1}
    assert (first.weight.item(), second.weight.item()) == (1 - 1 - 2, 1 - 8)
    assert run.metrics["train/second/loss"] == 4.0
    assert len(run.history.losses["second/loss"]) == 1


def test_sparse_gradients_are_checked_and_trained() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x).sum(-1)

    torch.use_deterministic_algorithms(False)  # torch has no deterministic sparse sum
    try:
        net = Bag()
        before = net.table.weight.detach().clone()
        task = lw.Supervised(net, nn.MSELoss(), torch.optim.SparseAdam(list(net.parameters()), lr=0.1))
        data = [(torch.tensor([1, 3, 3]), torch.ones(3))]
        trainer(epochs=1).fit(task, data)
        moved = (net.table.weight != before).any(1).tolist()
        assert moved == [False, True, False, True, False]
        after = net.table.weight.detach().clone()
        with pytest.raises(lw.NonFiniteError, match=r"gradients not finite: table\.weight"):
            trainer(epochs=1).fit(
                lw.Supervised(net, nn.MSELoss(), task.optimizer), [(torch.tensor([1, 2]), torch.tensor([1.0, NAN]))]
            )
        assert torch.equal(net.table.weight, after)
    finally:
        torch.use_deterministic_algorithms(True)


# ------------------------------------------------------------------------------------------------- the check by itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_any_nonfinite_finds_a_single_value_of_any_dtype(dtype: torch.dtype, bad: float) -> None:
    good = [torch.ones(3, dtype=torch.float32), torch.arange(8).to(dtype).view(2, 4).t()]
    copies = [g.clone() for g in good]
    assert not any_nonfinite(good, torch.tensor(1.0))
    assert same(good, copies)
    good[1][3, 1] = bad
    assert any_nonfinite(good, torch.tensor(1.0))
    assert any_nonfinite(good, None)
    good[1][3, 1] = 0.0
    assert not any_nonfinite(good, torch.tensor(1.0))  # the one before has left no trace


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_any_nonfinite_looks_at_the_loss_and_at_sparse_gradients(bad: float) -> None:
    assert any_nonfinite([torch.ones(2)], torch.tensor(bad))
    assert any_nonfinite([], torch.tensor(bad))
    assert not any_nonfinite([], torch.tensor(2.0))
    assert not any_nonfinite([], None)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    assert not any_nonfinite([sparse], torch.tensor(1.0))
    assert any_nonfinite([sparse * bad], torch.tensor(1.0))


def test_any_nonfinite_of_one_thread_is_not_that_of_another() -> None:
    wrong: list[Any] = []

    def check(value: float) -> None:
        grads = [torch.full((1000,), value)]
        wrong.extend(value for _ in range(300) if any_nonfinite(grads, torch.tensor(1.0)) != (value == INF))

    threads = [threading.Thread(target=check, args=(value,)) for value in (1.0, INF)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -------------------------------------------------------------------------------------------------------------- LBFGS


def lbfgs(net: nn.Module, **settings: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5, **settings)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_has_the_bits_of_the_hand_written_loop_with_a_closure(line_search: str | None) -> None:
    net = classifier(dropout=0.5)
    optimizer = lbfgs(net, line_search_fn=line_search)
    seed_all(3)
    losses = []
    for _ in range(2):
        for x, y in loader(batch_size=13, shuffle=True):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())  # type: ignore[arg-type]
    expected = bits(net, optimizer)

    net = classifier(dropout=0.5)
    optimizer = lbfgs(net, line_search_fn=line_search)
    seed_all(3)
    run = trainer(epochs=2).fit(
        lw.Supervised(net, nn.CrossEntropyLoss(), optimizer), loader(batch_size=13, shuffle=True)
    )
    assert same(bits(net, optimizer), expected)
    assert list(run.history.losses["loss"]) == losses
    assert run.progress.step == 6


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_lbfgs_puts_the_parameters_back_when_they_are_not_finite(kind: str) -> None:
    net, reference = line(1.0), line(1.0)
    trainer(epochs=1).fit(lw.Supervised(reference, spoiled(kind), lbfgs(reference)), batches()[:2])
    with pytest.raises(
        lw.NonFiniteError, match=r"LBFGS left a loss of .* at step 3; the parameters have been put back"
    ):
        trainer(epochs=1).fit(lw.Supervised(net, spoiled(kind), lbfgs(net)), batches(2))
    assert torch.equal(net.weight, reference.weight)


def test_skip_step_inside_a_closure_puts_the_parameters_back() -> None:
    net, calls = line(1.0), []

    def drop(run: lw.Run, loss: Tensor, *rest: Any) -> Tensor:
        calls.append(net.weight.item())
        if len(calls) == 2:
            raise lw.SkipStep
        return loss

    user = trainer(epochs=1, callbacks=[acts(map_loss=drop)])
    with pytest.warns(lw.errors.LoopwrightWarning, match="epoch 1 went by without an optimizer step"):
        run = user.fit(lw.Supervised(net, spoiled("nan"), lbfgs(net)), batches()[:1])
    assert calls[1] != 1.0
    assert net.weight.item() == 1.0
    assert run.progress.step == 0


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"accumulate": 2}, "accumulate=2"),
        ({"clip_norm": 1.0}, "clip_norm=1.0"),
        ({"nonfinite": "skip"}, "nonfinite='skip'"),
        ({"precision": "bf16"}, "precision='bf16'"),
        ({"callbacks": [acts(on_grads_ready=lambda *args: None)]}, "Acts.on_grads_ready"),
    ],
)
def test_what_cannot_apply_to_lbfgs_is_refused_before_step_0(settings: dict[str, Any], shown: str) -> None:
    net = line()
    with pytest.raises(lw.PlanError) as caught:
        trainer(epochs=1, **settings).fit(lw.Supervised(net, nn.MSELoss(), lbfgs(net)), pairs([1.0]))
    assert caught.value.problems == [
        f"{shown} cannot apply to LBFGS, which calls the step back as often as it needs; leave it out"
    ]


# ------------------------------------------------------------------------------------------------------------ precision


def test_bf16_runs_the_step_in_bfloat16_and_keeps_the_weights_in_float32() -> None:
    ends, dtypes = [], []
    for precision in ("fp32", "bf16", "bf16"):
        net = classifier()
        watch = acts(on_step_end=lambda run, result: dtypes.append(result.output["preds"].dtype))
        task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
        run = trainer(epochs=1, precision=precision, callbacks=[watch]).fit(task, [samples()], [samples()])
        ends.append((bits(net)[0], run.metrics["valid/loss"]))
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert same(ends[1], ends[2])
    assert not same(ends[0][0], ends[1][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=0.02)
    assert ends[0][1] != ends[1][1]  # validation runs as training does


def test_a_skipped_step_leaves_nothing_in_the_metrics() -> None:
    net = line(1.0)
    task = lw.Supervised(
        net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.0), metrics={"mse": lw.metrics.MSE()}
    )
    run = trainer(epochs=1, nonfinite="skip").fit(task, pairs([1.0], [NAN], [1.0]))
    assert (run.skipped, run.history["train/loss"], run.history["train/mse"]) == (1, [1.0], [1.0])


def test_a_gradient_norm_that_overflows_is_not_finite() -> None:
    net = line()
    task = sgd_task(net, loss=lambda preds, target: preds.mean() * 1e30)
    with pytest.raises(lw.NonFiniteError):
        trainer(epochs=1, clip_norm=1.0).fit(task, pairs([1e9]))
    assert net.weight.item() == 0.0
