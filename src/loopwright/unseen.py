"""Looking at a model without changing anything: for validation, test and prediction."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loopwright import rng
from loopwright.data import move
from loopwright.data.generators import Streams, find_on_modules, kept
from loopwright.data.schema import Schema
from loopwright.errors import DataError, LoopwrightWarning
from loopwright.state import Run, Source

__all__ = ["read", "unseen"]


def read(run: Run, source: Source, kind: str) -> Iterator[Any]:
    """One pass over ``source`` for evaluation, on the device; an error says where it was.

    Generators that hang on the source are put back afterwards: training may draw from the same ones.
    """
    n, compared = 0, False
    with kept(_streams(source).find().values()):
        at = source.at if run.team is None else run.team.begin_epoch(source)
        batches = at(0, 0)
        try:
            for batch in batches:
                n += 1
                spare = False
                if run.team is not None:
                    run.team.batch, (batch, _, spare) = n, batch
                    if batch is None:
                        continue  # another rank has it
                if not compared and run.schema is not None:
                    compared = True
                    _compare(run.schema, batch, kind)
                batch = move(batch, run.device, run.precision.holds) if run.moves_batches else batch
                if run.team is not None and run.team.fills:
                    run.team.spare = batch
                if not spare:
                    yield batch
                batch = None  # or two would be held while the next one is fetched
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


def _compare(schema: Schema, batch: Any, kind: str) -> None:
    """Raise DataError if ``batch`` has other dtypes or parts than those of training; other sizes may be meant."""
    told = schema.differences(batch, f"{kind} batch", partial=True)
    if told:
        if schema.loose().differences(batch, partial=True):
            schema.check(batch, f"{kind} batch", partial=True)
        warnings.warn(f"{'; '.join(told)}. If that is meant, all is well", LoopwrightWarning, stacklevel=2)


def _streams(source: Source) -> Streams:
    known = getattr(source, "streams", None)  # our own sources know where to look
    return known if isinstance(known, Streams) else Streams({"source": source})


@contextmanager
def unseen(run: Run) -> Iterator[None]:
    """Modules in eval mode, each with its own flag put back; all random generators forked; no gradients.

    The generators are the global ones, and those that hang on the task and its modules.
    """
    roots = [run.task] if isinstance(run.task, nn.Module) else list(run.models.values())
    modules = [module for root in roots for module in root.modules()]
    flags = [(module, module.training) for module in modules]
    for root in roots:
        root.eval()
    try:
        with rng.forked(), kept(find_on_modules(modules)), torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
