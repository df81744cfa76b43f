"""What the loop asks of the other ranks while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from loopwright import rng
from loopwright.errors import DataError, LoopwrightError, SettingError
from loopwright.events import HOOKS
from loopwright.history import Sums
from loopwright.parallel.comm import Parts, Ranks
from loopwright.parallel.norms import Norms, syncs_norms
from loopwright.parallel.pulse import Pulse
from loopwright.parallel.shards import is_shard, spans
from loopwright.parallel.watch import Watch
from loopwright.state import Comm, Phase, Run, Source, Stage, Strategy
from loopwright.written import is_ours, warn

__all__ = ["Spare", "Team", "readers", "watched"]

_STEERING = (
    "on_step_start", "on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end", "on_grads_ready",
)  # fmt: skip
_SLOW, _SOON_S = 0.2, 30.0  # of all time, lost by one rank; the first seconds tell nothing
_GONE: Any = object()


@dataclass(frozen=True, slots=True)
class Spare:
    """A batch of which this rank has no part: it goes along with the others, and nothing of it counts."""

    batch: Any


class Team:
    """This rank among the others: how its window is shared out, its gradients joined, its values added up.

    Training: every batch is a global one, of which each rank has a slice; a rank's loss counts by its share of the
    window's samples, so that the mean of the gradients over ranks is that of one process. Evaluation: each rank has
    whole batches in turn, and what they gave is added in the order of the batches.

    ``ranks`` are all processes, ``comm`` those that have a part of the data each. It is the same unless the strategy
    says by ``data_part`` that several see the same samples.
    """

    def __init__(self, ranks: Ranks, strategy: Strategy, device: torch.device) -> None:
        self.ranks, self.strategy, self.pulse = ranks, strategy, Pulse(ranks)
        self.comm: Ranks | Parts = ranks
        if hasattr(strategy, "data_part"):
            self.comm = Parts(ranks, *strategy.data_part(device, ranks.world_size))
        self.size = self.comm.world_size
        self.alike = self.size != ranks.world_size  # several ranks see the same samples
        self.norms = Norms() if syncs_norms(strategy) else None
        if self.alike and self.norms is not None:
            raise SettingError(
                "sync_batch_norm=True adds up what all ranks measure, and by data_part of the strategy several have "
                "the same samples, which would count several times; leave sync_batch_norm=True out"
            )
        self.local = 0.0  # samples (tokens) of the last step on this rank
        self.steered = False  # some hook may skip batches or steps, on this rank only
        self.asks = True  # something may ask to stop at the end of an epoch, log values or draw random numbers there
        self._synced: Mapping[str, Any] = {}
        self._count, self._weights, self.weight, self._done = 0, [0.0], 0.0, False
        self.needs: list[dict[str, float]] = []  # seconds that each rank has waited for data, and spent in forward
        self._told = False
        self._told_ahead: Callable[[], Any] | None = None  # gives the random numbers of rank 0
        self.batch = 0  # number of the whole batch that this rank evaluates
        self.recorded = -1  # the step of the last record
        self.shards = bool(getattr(strategy, "shards", False))  # parameters are shared out
        # there every rank takes part in every forward and backward of training
        self.fills = self.shards or self.norms is not None
        self.spare: Any = None  # what this rank computes on while it evaluates nothing
        self.spread: Any = None
        self.mesh: Any = None

    def sharing(self, device: torch.device) -> Any:
        """The ranks in a row, where parameters are shared out over all of them; None elsewhere. All ranks together."""
        mesh = self._mesh(device)
        return mesh if mesh is not None and spans(mesh) else None

    def _mesh(self, device: torch.device) -> Any:
        if self.shards and self.mesh is None:
            self.mesh = self.strategy.mesh(device, self.ranks.world_size)  # type: ignore[attr-defined]
        return self.mesh

    def shard(self, run: Run, optimizers: Iterable[Any] = ()) -> None:
        """Let this rank keep its part of each parameter, before optimizers are made."""
        if not self.shards:
            return
        from loopwright.parallel.spread import Spread

        strategy: Any = self.strategy
        mesh, models = self._mesh(run.device), run.models
        for model in models.values():
            self.ranks.broadcast_tensors(p for p in model.parameters() if not is_shard(p) and not is_lazy(p))
        whole = {name: model for name, model in models.items() if not any(map(is_shard, model.parameters()))}
        self.spread = Spread(models.values(), optimizers, lambda: strategy.shard(run.task, whole, mesh))

    def undo(self) -> None:
        """The fit does not take place: models and optimizers are what they were."""
        if self.spread is not None:
            self.spread.undo()
        self.spread = None

    # --------------------------------------------------------------------------------------------- data

    def begin_epoch(self, source: Source) -> Callable[[int, int], Iterator[Any]]:
        """``source.at``, which opens the data with the random numbers of rank 0: all ranks have one order."""

        def at(epoch: int, batch: int) -> Iterator[Any]:
            told, self._told_ahead = self._told_ahead, None
            mine = rng.get()
            rng.set((told or self.ranks.send(mine))())
            batches = source.at(epoch, batch)
            first = next(batches, _GONE)  # by now a sampler has drawn its order
            if self.comm.rank:  # who sees the same samples as rank 0 draws as it does
                rng.set(mine)
            return _after(first, batches)

        return at

    def end_epoch(self, run: Run, mine: Sums) -> Sums:
        """What hooks have logged at the end of the epoch, of all ranks; stop together if one of them has asked to."""
        if not self.asks:
            return mine
        found = self.pulse.settle(run, mine)
        return _added(found[speaker] for speaker in self.comm.speakers)

    def tell_ahead(self) -> None:
        """Another epoch follows, and nothing draws before its data does: it begins with the random numbers of now."""
        if not self.asks:
            self._told_ahead = self.ranks.send(rng.get())

    def _drop_ahead(self) -> None:
        if self._told_ahead is not None:
            self._told_ahead()
            self._told_ahead = None

    def _compare_epochs(self, run: Run, found: list[tuple[Any, float, float]]) -> None:
        """Of each rank, what it has read, and how long it took. Raises DataError for orders that are not the same."""
        if len({digest for digest, *_ in found}) > 1:
            raise DataError(
                f"in epoch {run.progress.epoch} each rank has read an order of its own: its sampler depends on more "
                "than the global random generators and set_epoch. Seed it alike on all ranks, or use "
                "lw.Loader(dataset, shuffle=True)"
            )
        self.needs = [{"waited": waited, "forward": forward} for _, waited, forward in found]
        if self.ranks.rank == 0:
            self._name_the_slow(run)

    def _name_the_slow(self, run: Run) -> None:
        """Warn once of a rank for which all others wait."""
        sums = [sum(one.values()) for one in self.needs]
        slowest, usual = max(sums), sorted(sums)[(len(sums) - 1) // 2]
        if self._told or slowest - usual < _SLOW * max(run.progress.seconds, _SOON_S):
            return
        self._told, rank = True, sums.index(slowest)
        one = self.needs[rank]
        warn(
            f"rank {rank} is slow: in {run.progress.seconds:.3g} s it has waited {one['waited']:.3g} s for data and "
            f"needed {one['forward']:.3g} s for forward passes, {slowest - usual:.3g} s more than others, who wait for "
            "it at each step. Look at its disk, its other processes and its clock rate; run.json lists all ranks"
        )

    # --------------------------------------------------------------------------------------------- a stage

    def begin(self, run: Run) -> None:
        """All ranks begin with the weights and buffers of rank 0, and with as much data."""
        self.follow(run, parameters=True)
        staged = [callback for stage in run.stages for callback in stage.callbacks]

        def foreign(names: Iterable[str]) -> bool:
            hooks = (hook for n in names for hook in (*getattr(run.hooks, n), *(getattr(c, n) for c in staged)))
            return any(not is_ours(type(getattr(hook, "__self__", None))) for hook in hooks)

        stops = any(callback.stops for callback in (*run.callbacks, *staged))
        stops |= any(not is_ours(type(one)) for one in (*run.loggers, *run.savers))
        asking = foreign(HOOKS) or not isinstance(run.task, torch.nn.Module)  # a step function, which is given the run
        lengths = [stage.source.batches for stage in run.stages]
        # callbacks may differ from rank to rank
        found = self.ranks.gather((lengths, foreign(_STEERING), asking, asking or stops))
        _compare(run.stages, [lengths for lengths, *_ in found])
        self.steered, self.pulse.each_step, self.asks = (any(one[i] for one in found) for i in (1, 2, 3))
        for meters in (*run.meters.values(), *(phase.meters for stage in run.stages for phase in stage.phases)):
            if meters is not None:
                meters.check_ranks(alike=self.alike)

    def end(self, run: Run, *, failed: bool = False) -> None:
        """Give the phases their own steps back, and the models their whole parameters.

        After an error, which the other ranks may not have met, nobody waits for them: where training had begun, models
        stay in parts.
        """
        if not failed:
            self._drop_ahead()
        for synced in self._synced.values():
            if hasattr(synced, "end"):
                synced.end()
        self._synced = {}
        if self.norms is not None:
            self.norms.put_back()
        if self.spread is not None and failed and not self.spread.begun:
            self.spread.undo()
        elif self.spread is not None and not failed and self.strategy.gather:  # type: ignore[attr-defined]
            self.spread.gather(run.optimizers.values())
        self.spread = None

    def follow(self, run: Run, *, parameters: bool = False) -> None:
        """Take the buffers of rank 0, such as the statistics of batch norm, and if asked for its parameters."""
        for model in run.models.values():
            tensors = chain(model.parameters(), model.buffers()) if parameters else model.buffers()
            self.ranks.broadcast_tensors(tensor for tensor in tensors if not is_shard(tensor))

    def begin_stage(self, run: Run, stage: Stage) -> None:
        """Join the gradients of the parameters that train in ``stage``."""
        closures = [phase.name for phase in stage.phases if phase.closure]
        if closures:
            raise SettingError(
                f"phase {closures[0]!r} has an optimizer that calls its step back (LBFGS), which several ranks cannot "
                "do in step; train it with one process"
            )
        self._drop_ahead()  # what a stage begins with may draw as well
        if self.spread is not None:
            self.spread.begin()
        if self.norms is not None:
            self.norms.join(run.models.values(), compiled=run.compiler is not None)
        self._synced = self.strategy.begin_stage(run, stage)

    # --------------------------------------------------------------------------------------------- a step

    def has_part(self, size: int) -> bool:
        """True if this rank has a sample in a batch of ``size``."""
        return size * (self.comm.rank + 1) // self.size > size * self.comm.rank // self.size

    def open(self, weights: list[float], count: int) -> None:
        """A window begins: the weights of its batches over all ranks, ``count`` of which have a part here."""
        self.weight, self._weights, self._count = sum(weights), weights, count

    def even(self, size: int) -> bool:
        """True if the mean over ranks of their own means is the mean over the samples of a batch of ``size``."""
        return size % self.size == 0 and not self.steered

    def marked(self, run: Run, window: Iterable[Any], phase: Phase) -> Iterator[Any]:
        """The batches of a window; gradients are joined in the backward of its last one."""
        synced = self._synced.get(phase.name)
        if synced is not None and synced.stale:
            self.begin_stage(run, run.stages[run.progress.stage])
            synced = self._synced[phase.name]
        self._done = synced is None
        if self.norms is not None:
            self.norms.full = (
                run.stages[run.progress.stage].counts_samples and not self.steered and min(self._weights) >= self.size
            )
        for number, batch in enumerate(window, 1):
            last = number == self._count
            if synced is not None:
                synced.last = last
                if self.shards and self._count > 1:
                    synced.held = None if last else batch.batch if isinstance(batch, Spare) else batch
            norms = self.norms if synced is not None else None  # a phase that moves nothing waits for nobody
            try:
                if norms is not None:
                    norms.on, norms.counts = True, not isinstance(batch, Spare)
                if not isinstance(batch, Spare):
                    yield batch
                elif synced is not None:
                    synced.idle(batch.batch)
            finally:
                if norms is not None:
                    norms.on = False
            self._done |= last

    def join(self, run: Run, phase: Phase, seen: float, skips: bool, ends: bool) -> tuple[float, bool, bool]:
        """After a phase has gone over its window here: what all ranks have seen, and whether any skips or ends."""
        if not self._done:
            self._synced[phase.name].flush()
        self.local, total = seen, self.weight
        if self.steered:
            total, skipping, ending = self.comm.sums([seen, skips, ends])
            skips, ends = skipping > 0, ending > 0
        if total and not skips and phase.name in self._synced:
            self._synced[phase.name].check()
        return total, skips, ends

    # --------------------------------------------------------------------------------------------- evaluation

    def keep_up(self, run: Run, step: Callable[[Any], Any]) -> None:
        """All is evaluated here; where other ranks have one more batch, take part in its forward."""
        if self.shards and self.comm.rank >= self.batch % self.size > 0:
            with run.precision.autocast(run.device):
                step(self.spare)
        self.spare = None

    # --------------------------------------------------------------------------------------------- values

    def joined_sums(self, run: Run, mine: Sums) -> Sums:
        """Sums of values and weights by name, of all ranks together.

        Raises LoopwrightError if the ranks have not made the same steps.
        """
        found = self.comm.gather((run.progress.step, mine))
        _compare_steps([step for step, *_ in found])
        return _added(sums for _, sums in found)

    def joined_epoch(self, run: Run, stage: Stage, meters: Sequence[Any], mine: Sums) -> Sums:
        """The same of an epoch of ``stage`` that ends; ``meters`` take in what was measured on all ranks.

        By the way all hear what time it is and who wants to stop. Raises LoopwrightError if the ranks have not made
        the same steps, and DataError if they have not read the same order.
        """
        source: Any = stage.source
        while hasattr(source, "source"):
            source = source.source
        forward = sum(synced.seconds for synced in self._synced.values())
        needs = getattr(source, "digest", None), run.waited, forward
        found = self.ranks.gather((run.progress.step, mine, [one.cut() for one in meters], needs, self.pulse.tell(run)))
        _compare_steps([step for step, *_ in found])
        self.pulse.hear(run, [told for *_, told in found])
        self._compare_epochs(run, [needs for *_, needs, _ in found])
        parts = [found[speaker] for speaker in self.comm.speakers]
        for number, one in enumerate(meters):
            one.join(cuts[number] for _, _, cuts, *_ in parts)
        return _added(sums for _, sums, *_ in parts)

    def in_order(self, mine: list[tuple[int, Any]]) -> list[Any]:
        """What all ranks have of their whole batches, each with its number, in the order of the batches."""
        found = [one for ranks in self.comm.gather(mine) for one in ranks]
        return [one for _, one in sorted(found, key=itemgetter(0))]


def readers(run: Run) -> Comm:
    """``run.comm`` by the parts of the data: what is counted by samples is counted here."""
    return run.comm if run.team is None else run.team.comm


def watched(run: Run, on_abort: Callable[[str], object] | None = None) -> AbstractContextManager[Any]:
    """Around what the ranks do together: one that fails, dies or hangs ends all of them, with words.

    They come out of it together. Raises FailedElsewhereError on a rank that has done its part, if another one has not.
    """
    if run.team is None:
        return nullcontext()
    timeout = getattr(run.team.strategy, "timeout", 30.0)
    return Watch(run.comm.rank, run.comm.world_size, lambda: run.progress.step, timeout=timeout, on_abort=on_abort)


def _compare(stages: Iterable[Stage], lengths: Iterable[Iterable[int | None]]) -> None:
    """Raise DataError if the data of a stage has other numbers of batches on some rank: the others would wait."""
    for stage, batches in zip(stages, zip(*lengths, strict=False), strict=False):
        if len(set(batches)) > 1:
            told = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(batches[:8]))
            raise DataError(
                f"the data of stage {stage.name!r} has not as many batches on all ranks: {told}. Each rank reads the "
                "whole data, and is given its part of every batch: pass the same data on all ranks"
            )


def _compare_steps(steps: Sequence[int]) -> None:
    """Raise LoopwrightError if some ranks have moved in a step that others have dropped, who were not waited for."""
    if len(set(steps)) > 1:
        told = ", ".join(f"{step} on rank {rank}" for rank, step in enumerate(steps[:8]))
        raise LoopwrightError(
            f"the ranks have not made the same steps: {told}. A hook has raised SkipStep on some of them alone, and "
            "their weights have drifted apart since. From on_step_start and on_grads_ready all must raise it: ask "
            "run.comm.any(...) on each rank, and raise it if that is true"
        )


def _added(parts: Iterable[Sums]) -> Sums:
    total: Sums = {}
    for sums in parts:
        for name, (value, weight) in sums.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + value, before[1] + weight
    return total


def _after(first: Any, batches: Iterator[Any]) -> Iterator[Any]:
    try:
        if first is not _GONE:
            yield first
            first = None  # or two would be held while the next one is fetched
            yield from batches
    finally:
        if hasattr(batches, "close"):
            batches.close()
