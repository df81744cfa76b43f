"""What a training step is made of: its window of batches, its output, its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopwright._compat import any_nonfinite, backward, has_unscaled, may_alias, overflowed, take_step
from loopwright.accumulation import Amount, check_unit
from loopwright.data import Chunks, move, schema_of
from loopwright.data.batch import check_count
from loopwright.data.iterated import planned_sizes
from loopwright.doubles import add_doubles
from loopwright.errors import DataError, NonFiniteError, SkipBatch, SkipStep, StepOutputError, StopEpoch
from loopwright.events import add_place, describe, fire, fold, hook_name
from loopwright.out_of_memory import add_memory
from loopwright.parallel import Spare, is_shard, local
from loopwright.state import Phase, Run, Stage
from loopwright.written import warn

__all__ = [
    "as_output",
    "backward",
    "closure_step",
    "count_epoch",
    "end_scaling",
    "explain",
    "mapped",
    "nonfinite",
    "noted",
    "prepared",
    "rescale",
    "scalars",
    "take_step",
    "true_means",
    "unscale",
    "windows",
    "zero_grad",
]

_Window = tuple[Iterable[Any], "list[float] | None"]
_STEPLESS = 10  # epochs in a row without a step
_NOTED = 8  # batches from which is learned what a batch is made of, and which of its sizes vary


def noted(run: Run, batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; what the first few are made of is kept, to be compared with what is predicted later."""
    source = run.stage.source if run.stage is not None else None
    planned = planned_sizes(source, run.progress.batch) if run.counts_samples else None
    try:
        for batch in islice(batches, _NOTED):
            if planned is not None:
                check_count(batch, next(planned, None), "training")
            mine = source.batch if isinstance(source, Chunks) else batch if run.team is None else batch.batch
            if mine is not None:
                run.schema = schema_of(mine) if run.schema is None else run.schema.including(mine)
            yield batch
            batch = mine = None  # or two would be held while the next one is fetched
        yield from batches
    finally:
        if hasattr(batches, "close"):
            batches.close()


def windows(run: Run, stage: Stage, batches: Iterator[Any]) -> Iterator[_Window]:
    """Windows of what ``stage.accumulate`` says, each with the weights of its batches (None for single ones).

    Where the plan of the order tells the sizes, batches are fetched one at a time as in a hand-written loop; otherwise
    the window is read ahead, since the weight of its last batch is needed for the gradient of its first.
    """
    n, sizes, team = stage.accumulate, None, run.team
    if n == 1 and team is None:
        return zip(zip(batches), repeat(None))
    if n != 1 and len(stage.phases) == 1 and stage.counts_samples:
        sizes = stage.source.sizes(run.progress.batch)
    if team is not None:
        return _shared(stage, batches, sizes, team)
    return _held(run, stage, batches) if sizes is None else _planned(run, stage, batches, sizes)


def _planned(run: Run, stage: Stage, batches: Iterator[Any], sizes: Iterator[int]) -> Iterator[_Window]:
    while planned := [float(size) for size in _amount(run, stage).take(sizes, float)]:
        yield islice(batches, len(planned)), planned
    next(batches, None)  # as a for loop does: a sampler may draw when it is asked for more than there is


def _held(run: Run, stage: Stage, batches: Iterator[Any]) -> Iterator[_Window]:
    weighed = ((batch, stage.weight(batch)) for batch in batches)
    while held := _amount(run, stage).take(weighed, itemgetter(1)):
        yield [batch for batch, _ in held], [weight for _, weight in held]


def _amount(run: Run, stage: Stage) -> Amount:
    """What the next window is to hold, from where the run stands now: the same again after a resume."""
    n = stage.accumulate
    amount = Amount(n, "batches") if isinstance(n, int) else n.at(run.progress)
    check_unit(amount.unit, counts_samples=stage.counts_samples)
    return amount


def _shared(stage: Stage, parts: Iterator[Any], sizes: Iterator[int] | None, team: Any) -> Iterator[_Window]:
    """This rank's part of each window, with the weights of its batches over all ranks."""
    n = stage.accumulate
    while True:
        if sizes is not None:
            planned = [float(size) for size in islice(sizes, n)]
            count = len(planned) if team.fills else sum(team.has_part(int(size)) for size in planned)
            window: Iterable[Any] = (_own(part) for part in islice(parts, len(planned)) if part.batch is not None)
        else:
            held = list(islice(parts, n))
            mine = [0.0 if part.batch is None or part.spare else stage.weight(part.batch) for part in held]
            window = [part.batch if weight else Spare(part.batch)  # no token, no loss
                      for part, weight in zip(held, mine, strict=True) if weight or team.fills]  # fmt: skip
            count = len(window)
            planned = [float(part.size) for part in held] if stage.counts_samples else team.comm.sums(mine)
        if not planned:
            if sizes is not None:
                next(parts, None)  # as a for loop does
            return
        team.open(planned, count)
        yield window, None if n == 1 and stage.counts_samples and team.even(planned[0]) else planned


def _own(part: Any) -> Any:
    return Spare(part.batch) if part.spare else part.batch


def prepared(run: Run, window: Iterable[Any]) -> Iterator[Any]:
    """The batches of a window on the device, as the hooks want them; those skipped are left out.

    Where parameters are shared out, ranks need one another for each batch: what is skipped here becomes a spare one,
    and what a hook raises to end the window is raised after its last batch.
    """
    hooks, fills = run.hooks, run.team is not None and run.team.fills
    ends: SkipStep | StopEpoch | None = None
    for batch in window:
        spare = isinstance(batch, Spare) or ends is not None
        batch = batch.batch if isinstance(batch, Spare) else batch
        if run.moves_batches:
            batch = move(batch, run.device, run.precision.holds)
        try:
            if hooks.on_batch_start and not spare:
                fire(hooks.on_batch_start, run, batch)
            if hooks.map_batch and ends is None:
                batch = fold(hooks.map_batch, run, batch)
        except SkipBatch:
            if not fills:
                continue
            spare = True
        except (SkipStep, StopEpoch) as raised:
            if not fills:
                raise
            ends, spare = raised, True
        yield Spare(batch) if spare else batch
    if ends is not None:
        raise ends


def zero_grad(optimizer: Optimizer) -> None:
    """Set gradients to None directly: torch's own does the same and records a profiler range for 5 us."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in optimizer.__dict__:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:  # read anew at each step: groups may be added
        for parameter in group["params"]:
            parameter.grad = None


def as_output(output: Any, phase: Phase | None, by: str = "") -> dict[str, Any]:
    """A step's return value as a dict; ``loss`` must be in it where a phase moves optimizers.

    ``by``: who returned it, if not the step.
    """
    if isinstance(output, Tensor):
        return {"loss": output}
    known = isinstance(output, Mapping)
    moves = phase is not None and bool(phase.moved)
    if not moves:
        if known or output is None:
            return dict(output or {})
        if isinstance(output, (int, float)) or getattr(output, "ndim", None) == 0:  # NumPy's and JAX's, too
            return {"loss": float(output)}
    elif known and "loss" in output:
        return dict(output)
    name = by or ("the step" if phase is None else f"step {phase.name!r}")
    if not known:
        raise StepOutputError(
            f"{name} returned {describe(output) if output is not None else 'None'}; return the loss (a tensor"
            f"{'' if moves else ', or a number'}), or a dict such as "
            '{"loss": loss, "preds": preds, "target": target}'
        )
    raise StepOutputError(
        f"{name} returned the keys {sorted(map(str, output))}; a training step must return 'loss', a scalar tensor"
    )


def mapped(run: Run, output: dict[str, Any], batch: Any, phase: Phase) -> dict[str, Any]:
    """What the ``map_output`` hooks make of a step's output."""
    for hook in run.hooks.map_output:
        output = fold((hook,), run, output, batch, phase)
        if type(output) is not dict or "loss" not in output:
            output = as_output(output, phase, hook_name(hook, run))
    return output


def scalars(
    output: Mapping[str, Any], values: dict[str, Any], prefix: str, share: float | None, shares: dict[str, float]
) -> None:
    """Put the scalars of ``output`` into ``values``, detached; with ``share``, add that part of each to it."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            if value.dim():
                if name != "loss" or value.numel() != 1:
                    continue
                value = value.reshape(())
            # what may be a parameter, a buffer or a view must not be held or followed: on the CPU it is read at once
            if may_alias(value):
                value = value.item() if value.is_cpu and name != "loss" else value.detach().clone()
            elif value.requires_grad:
                value = value.detach()
        elif not isinstance(value, (int, float)):
            if getattr(value, "ndim", None) != 0:  # a numpy scalar is one, too
                continue
            value = float(value)
        if not isinstance(name, str):
            raise StepOutputError(f"a step returned a dict with the key {name!r}; name values by strings: '{name}'")
        if prefix:
            name = prefix + name
        if share is None:
            values[name] = value
        else:
            values[name] = value * share + values[name] if name in values else value * share
            shares[name] = shares.get(name, 0.0) + share


def rescale(phase: Phase, factor: float) -> None:
    """Correct the gradients of a window whose weight was not the planned one."""
    for parameter in phase.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def true_means(values: dict[str, Any], shares: Mapping[str, float]) -> None:
    """Make each of ``values`` the mean over the batches that gave it, which may be less than the planned window."""
    for name, share in shares.items():
        if abs(share - 1.0) > 1e-9:
            values[name] = values[name] / share


def nonfinite(run: Run, phase: Phase, loss: Any, norm: Tensor | None) -> bool:
    """True if this step must be dropped since its loss or a gradient is not finite; raises if the run says so.

    ``loss`` is None on a rank that had no batch.
    """
    if not phase.moved:
        _judge_by_loss(run, phase, loss)
        return False
    if run.precision.scaler is not None and not _is_own_fault(run, phase, loss, norm):
        return run.skips_in_row > 0
    grads = [
        grad
        for optimizer in phase.moved
        for group in optimizer.param_groups
        for p in group["params"]
        if (grad := p.grad) is not None
    ]
    shared = set(map(type, grads)) != {Tensor} and any(map(is_shard, grads))  # as a rule no call for each
    if shared:
        grads = [local(grad) for grad in grads]
    found = norm is not None and not math.isfinite(norm.item())  # clipped by it, every gradient would be 0
    found = found or any_nonfinite(grads, loss)
    if run.team is not None and (shared or run.nonfinite == "skip"):
        found = run.team.comm.any(found)
    if not found:
        run.skips_in_row = 0
        if not grads and loss is not None and phase.name not in run.progress.phase_steps:
            _say_idle(phase)
        return False
    run.skips_in_row += 1
    if run.nonfinite == "skip" and run.skips_in_row <= run.skip_limit:
        run.skipped += 1
        return True
    names = {id(p): name for model in run.models.values() for name, p in model.named_parameters()}
    bad = [
        names.get(id(p), "a parameter")
        for p in phase.parameters()
        if p.grad is not None
        and not bool(torch.isfinite(p.grad.coalesce().values() if p.grad.is_sparse else local(p.grad)).all())
    ]
    batches, p = len(run.open_step[0] or ()), run.progress
    among = f", in one of batches {p.batch + 1} to {p.batch + batches} of epoch {p.epoch + 1}" if batches > 1 else ""
    where = f"; gradients not finite: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}" if bad else ""
    rule = (
        f" ({run.skips_in_row} steps in a row; at most {run.skip_limit} may be skipped)"
        if run.nonfinite == "skip"
        else ""
    )
    raise NonFiniteError(
        f"phase {phase.name!r} has a loss of {math.nan if loss is None else float(loss):g} at step "
        f"{p.step + 1}{among}{where}{rule}. The parameters are those of before this step. Look for a learning "
        "rate too high, log or division of 0, or bad input; "
        'nonfinite="skip" leaves such steps out, nonfinite=None trains on'
    )


def _judge_by_loss(run: Run, phase: Phase, loss: Any) -> None:
    """Raise for a loss that is not finite of a step that moves its optimizers itself, where the run says so."""
    if loss is None or run.nonfinite != "raise":
        return
    if any_nonfinite([], loss) if isinstance(loss, Tensor) else not math.isfinite(loss):
        raise NonFiniteError(
            f"phase {phase.name!r} has a loss of {float(loss):g} at step {run.progress.step + 1}. Its step moves its "
            "optimizers itself, so that the parameters may have changed already; go on from the last checkpoint. Look "
            "for a learning rate too high, log or division of 0, or bad input; nonfinite=None trains on"
        )


def count_epoch(run: Run, stage: Stage, *, stepped: bool, asked: bool) -> None:
    """Tell of an epoch that went by without an optimizer step, and raise after ten of them in a row.

    A stage that is counted in steps would never end. ``asked``: a hook has ended it before its first step.
    """
    if stepped:
        run.stepless = 0
        return
    run.stepless += 1
    said = (
        f"went by without an optimizer step in stage {stage.name!r}: every batch was left out by SkipBatch or "
        "SkipStep, weighed 0, or had a loss that is not finite, or StopEpoch ended it"
    )
    if run.stepless >= _STEPLESS:
        raise DataError(f"{run.stepless} epochs in a row {said}. Let some batches through")
    if run.stepless == 1 and not asked and run.precision.scaler is None:  # which leaves its first steps out by itself
        warn(f"epoch {run.progress.epoch + 1} {said}")


def _say_idle(phase: Phase) -> None:
    names = " and ".join(type(optimizer).__name__ for optimizer in phase.moved)
    warn(
        f"the first loss of phase {phase.name!r} gave no gradient to any parameter of its {names}, which moves nothing "
        "so: compute the loss from the very module whose parameters the optimizer has"
    )


def unscale(scaler: torch.amp.GradScaler, phase: Phase) -> None:
    """Divide the gradients of a window by the scale, once for each optimizer: clipping and hooks see the true ones."""
    for optimizer in phase.moved:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            scaler.unscale_(optimizer)


def end_scaling(scaler: torch.amp.GradScaler) -> None:
    """After all phases of a step: make the scale smaller if one has overflowed, larger after many that have not."""
    if has_unscaled(scaler):
        scaler.update()


_HALVINGS = 30  # from the first scale, 2**16, to the end of float16: what overflows then is not for scaling to mend


def _is_own_fault(run: Run, phase: Phase, loss: Any, norm: Tensor | None) -> bool:
    """Of a step under a gradient scaler: True for a loss that is not finite, where ``nonfinite`` has to judge.

    Gradients that overflow under a finite loss are the scaler's business: ``run.skips_in_row`` counts the step, which
    is dropped, and the scale is halved. If that does not end, NonFiniteError is raised, unless ``nonfinite`` is None.
    """
    scaler = run.precision.scaler
    assert scaler is not None
    any_rank = bool if run.team is None else run.team.comm.any
    told = [value for value in (loss, norm) if value is not None and run.nonfinite is not None]
    if not any_rank(overflowed(scaler, phase.moved, told)):
        run.skips_in_row = 0
        return False
    if any_rank(run.nonfinite is not None and loss is not None and not math.isfinite(float(loss))):
        return True
    run.skips_in_row += 1
    if run.nonfinite is None or run.skips_in_row <= max(_HALVINGS, run.skip_limit):
        run.skipped += 1
        return False
    raise NonFiniteError(
        f"phase {phase.name!r}: the gradients of {run.skips_in_row} steps in a row were not finite, though the scale "
        f"of the loss has fallen to {scaler.get_scale():g}. The loss itself is "
        f"{math.nan if loss is None else float(loss):g}, so a backward is what overflows: look for a division by 0 or "
        "the root of 0 in the step. precision='bf16' has the range of fp32"
    )


def closure_step(run: Run, phase: Phase, batch: Any) -> dict[str, Any]:
    """One step of an optimizer that calls back (LBFGS): forward and backward happen as often as it asks.

    Returns the output of its first call. After a step that leaves a loss or a parameter not finite, the parameters are
    put back and NonFiniteError is raised; SkipStep and StopEpoch put them back as well.
    """
    (optimizer,), hooks = phase.moved, run.hooks
    outputs: list[dict[str, Any]] = []
    parameters = phase.parameters()
    before = [p.detach().clone() for p in parameters]

    def closure() -> Tensor:
        zero_grad(optimizer)
        output = as_output(phase.step(batch), phase)
        if hooks.map_output:
            output = fold(hooks.map_output, run, output, batch, phase)
        if hooks.map_loss:
            output["loss"] = fold(hooks.map_loss, run, output["loss"], output, batch, phase)
        loss: Tensor = output["loss"]
        loss.backward()
        if hooks.on_backward_end:
            fire(hooks.on_backward_end, run, loss, output, batch, phase)
        outputs[1:] = [output]  # the first and the last: an optimizer may call back very often
        return loss

    try:
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's own closures return a tensor, too
    except (SkipStep, StopEpoch):
        _put_back(parameters, before)
        raise
    if run.nonfinite is not None and any_nonfinite(
        [p.detach().clone() for p in parameters], outputs[-1]["loss"].detach()
    ):
        _put_back(parameters, before)
        raise NonFiniteError(
            f"phase {phase.name!r}: {type(optimizer).__name__} left a loss of {outputs[-1]['loss'].item():g} or a "
            f"parameter "
            f"that is not finite at step {run.progress.step + 1}; the parameters have been put back. Lower lr, or pass "
            'line_search_fn="strong_wolfe" to LBFGS'
        )
    return outputs[0]


@torch.no_grad()
def _put_back(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def explain(error: BaseException, run: Run, phase: Phase, output: Any, batch: Any) -> None:
    """Note the place on ``error``; raise a clearer one from it if the loss was no loss, or a skip came too late."""
    add_place(error, run, batch=batch)
    add_memory(error, run, batch)
    if run.compiler is not None and type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        error.add_note("[loopwright] this came while the step was compiled; Trainer(compile=False) trains without that")
    add_doubles(error)
    loss = output.get("loss") if isinstance(output, dict) else None
    better: Exception | None = None
    if isinstance(error, SkipBatch):
        better = StepOutputError(
            "SkipBatch came after map_batch had returned; raise lw.SkipStep to drop the step instead"
        )
    elif isinstance(error, (RuntimeError, AttributeError, ValueError)) and phase.moved and isinstance(output, dict):
        who = " or ".join([f"step {phase.name!r}", *(hook_name(hook, run) for hook in run.hooks.map_loss)])
        if not isinstance(loss, Tensor):
            better = StepOutputError(
                f"{who} returned a loss of type {type(loss).__name__}; return the tensor itself "
                "(without .item() or float()), so that gradients can be computed from it"
            )
        elif loss.numel() != 1:
            better = StepOutputError(
                f"{who} returned a loss of shape {list(loss.shape)}; return a scalar, such as loss.mean()"
            )
        elif loss.is_complex():
            better = StepOutputError(
                f"{who} returned a loss of {loss.dtype}; return a real one, such as loss.abs() or loss.real"
            )
        elif not loss.requires_grad:
            better = StepOutputError(
                f"{who} returned a loss that depends on no trainable parameter; leave out .detach(), "
                ".item() and torch.no_grad() in the step, and check requires_grad of the parameters"
            )
    if better is not None:
        add_place(better, run, batch=batch)
        raise better from error
