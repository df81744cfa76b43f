"""Looking at a model without changing anything: for validation, test and prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from loopwright import rng
from loopwright.data import move
from loopwright.data.ahead import copy_ahead
from loopwright.data.batch import check_count
from loopwright.data.generators import Streams, find_on_modules, kept
from loopwright.data.iterated import planned_sizes
from loopwright.data.schema import AS_TRAINED, Schema, other_sizes
from loopwright.doubles import add_doubles
from loopwright.errors import DataError, LoopwrightError, SkipBatch, SkipStep, StopEpoch
from loopwright.events import describe
from loopwright.out_of_memory import is_out_of_memory
from loopwright.state import Run, Source
from loopwright.written import warn

__all__ = ["read", "unseen"]


def read(run: Run, source: Source, kind: str) -> Iterator[Any]:
    """One pass over ``source`` for evaluation, on the device; an error says where it was.

    Generators that hang on the source are put back afterwards: training may draw from the same ones.
    """
    n, compared = 0, False
    # once is enough, a step of one's own may count what it likes, and FSDP makes parameters whole in a forward
    looked = kind == "predict" or len(run.history) > 0 or not _is_default(run.task, kind)
    looked = looked or (run.team is not None and run.team.shards)
    copy_ahead(source, run.device, run.precision.holds)
    with kept(_streams(source).find().values()):
        at = source.at if run.team is None else run.team.begin_epoch(source)
        batches = at(0, 0)
        planned = planned_sizes(source, 0) if run.counts_samples and kind != "predict" else None
        try:
            for batch in batches:
                n += 1
                spare = False
                if run.team is not None:
                    run.team.batch, (batch, _, spare) = n, batch
                    if batch is None:
                        continue  # another rank has it
                if not compared:
                    compared = True
                    if run.schema is not None:
                        _compare(run.schema, batch, kind)
                    if planned is not None:
                        check_count(batch, next(planned, None), kind)
                batch = move(batch, run.device, run.precision.holds) if run.moves_batches else batch
                if run.team is not None and run.team.shards:
                    run.team.spare = batch
                if not spare:
                    run.looking = (kind, n, batch)
                    before = _versions(run) if not looked else {}
                    yield batch
                    if not looked:
                        looked = True
                        _tell_changed(kind, [n for n, at in _versions(run).items() if before.get(n, at) != at])
                run.looking = batch = None  # or two would be held while the next one is fetched
        except Exception as error:
            error.add_note(f"[loopwright] in {kind}, batch {n}")
            raise
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
    if not n:
        raise DataError(
            f"the {kind} data gave no batch. If it is an iterator, it is used up: pass a list or a DataLoader"
        )


def _is_default(task: Any, kind: str) -> bool:
    """True if an evaluation is the training step once more, because nothing else was written."""
    steps = ("validation_step", "test_step") if kind == "test" else ("validation_step",)
    return all(getattr(getattr(type(task), one, None), "__module__", "") == "loopwright.task" for one in steps)


def _versions(run: Run) -> dict[str, int]:
    """How often each parameter and buffer was written to: a number that torch keeps.

    Not of those that a forward may write to in an evaluation as well: buffers that are not saved, embeddings of a
    bounded norm.
    """
    found: dict[str, int] = {}
    for model in run.models.values():
        scratch = {id(m._buffers[name]) for m in model.modules() for name in m._non_persistent_buffers_set}
        scratch |= {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not (is_lazy(tensor) or tensor.is_inference() or id(tensor) in scratch):
                found[name] = tensor._version
    return found


def _tell_changed(kind: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(
            f"in the {kind} data training_step changed {', '.join(names[:3])}{more}: what it measures there goes into "
            "the model. Write a validation_step that changes nothing, or let a phase without optimizers do what "
            "training_step does beside the loss"
        )


def _compare(schema: Schema, batch: Any, kind: str) -> None:
    """Raise DataError if ``batch`` has other dtypes or parts than those of training; other sizes may be meant."""
    told = schema.differences(batch, f"{kind} batch", partial=True)
    if told:
        if schema.loose().differences(batch, partial=True):
            schema.check(batch, f"{kind} batch", partial=True)
        warn(f"{'; '.join(told)}. If that is meant, all is well")


def _as_drift(run: Run, error: BaseException) -> DataError | None:
    """What to raise for ``error``, which a step raised, if its batch has sizes that training did not have."""
    own = (LoopwrightError, SkipBatch, SkipStep, StopEpoch)  # which say themselves what they are
    if run.looking is None or run.schema is None or not isinstance(error, Exception) or isinstance(error, own):
        return None
    if is_out_of_memory(error):  # may be caught by its type
        return None
    kind, _, batch = run.looking
    told = other_sizes(run.schema, batch, f"{kind} batch")
    why = str(error).partition("\n")[0]
    return DataError(f"{'; '.join(told)}; {type(error).__name__}: {why}. {AS_TRAINED}") if told else None


def _streams(source: Source) -> Streams:
    known = getattr(source, "streams", None)  # our own sources know where to look
    return known if isinstance(known, Streams) else Streams({"source": source})


@contextmanager
def unseen(run: Run) -> Iterator[None]:
    """Modules in eval mode, each with its own flag put back; all random generators forked; no gradients.

    The generators are the global ones, and those that hang on the task and its modules. What goes wrong with a batch
    that ``read`` has given is noted with the batch; it is a DataError if the batch has other sizes than in training.
    """
    roots = [run.task] if isinstance(run.task, nn.Module) else list(run.models.values())
    modules = [module for root in roots for module in root.modules()]
    flags = [(module, module.training) for module in modules]
    for root in roots:
        root.eval()
    try:
        with rng.forked(), kept(find_on_modules(modules)), torch.no_grad():
            yield
    except BaseException as error:
        if run.looking is not None:
            kind, n, batch = run.looking
            drift = _as_drift(run, error)
            told = drift or error
            told.add_note(f"[loopwright] in {kind}, batch {n}; batch: {describe(batch)}")
            add_doubles(told)
            if drift is not None:
                raise drift from error
        raise
    finally:
        run.looking = None
        for module, training in flags:
            module.training = training
