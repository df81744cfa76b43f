"""Batch norm over ranks: while a step is trained, the layers measure the whole batch instead of this rank's part."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from loopwright.parallel.comm import hold

__all__ = ["Norms", "norms_in", "syncs_norms"]

_KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # what a layer computes that can be done over ranks


def syncs_norms(strategy: object) -> bool:
    """True where batch norms are to measure over ranks."""
    return bool(getattr(strategy, "sync_batch_norm", False))


def norms_in(models: Iterable[nn.Module]) -> tuple[list[_BatchNorm], list[_BatchNorm]]:
    """Batch norms of ``models``: those that can measure over ranks, and those that are lazy or go their own way.

    >>> joined, others = norms_in([nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.BatchNorm2d(2))])
    >>> [type(layer).__name__ for layer in joined], others
    (['BatchNorm1d', 'BatchNorm2d'], [])
    """
    found = {id(m): m for model in models for m in model.modules() if isinstance(m, _BatchNorm)}.values()
    joined = [m for m in found if isinstance(m, _Joined) or (type(m).forward in _KNOWN and not _is_special(m))]
    return joined, [m for m in found if m not in joined]


def _is_special(layer: _BatchNorm) -> bool:
    """True for a layer that has a group, or a forward set on itself, or that changes its class by itself.

    ``checkpoint_activations`` sets a forward too: of the layer and None, which stands for that of its class.
    """
    forward = vars(layer).get("forward")
    asks_class = forward is None or (isinstance(forward, partial) and forward.args == (layer, None))
    lazy = isinstance(layer, _LazyNormBase)
    return lazy or not asks_class or getattr(layer, "process_group", None) is not None


class Norms:
    """The batch norms of a run: while ``on``, they measure what all ranks have of a batch, else what this one has.

    ``counts`` is False while this rank computes on samples that are not its own. ``full``: every rank is known to have
    some of its own. The layers are the same objects all the time, and of another class until ``put_back``.
    """

    def __init__(self) -> None:
        self.on, self.counts, self.full = False, True, False
        self._kinds: dict[type, type] = {}
        self._found: list[tuple[nn.Module, type]] = []  # layers, each with its class before

    def join(self, models: Iterable[nn.Module], *, compiled: bool = False) -> None:
        """Let the batch norms of ``models`` measure over ranks; those that do already stay as they are."""
        for layer in norms_in(models)[0]:
            kind: Any = type(layer)
            joined = isinstance(layer, _Joined)  # by this fit, or by one in whose hook this one is
            if not (joined and kind.norms is self):
                self._found.append((layer, kind))
                layer.__class__ = self._kind(kind.own if joined else kind, compiled=compiled)

    def _kind(self, own: type, *, compiled: bool) -> type:
        if own not in self._kinds:
            body: dict[str, Any] = {"norms": self, "own": own, "__module__": own.__module__}
            if compiled:  # no compiler can look into what ranks tell one another
                body["forward"] = torch.compiler.disable(_Joined.forward)
            self._kinds[own] = type(f"Sync{own.__name__}", (_Joined, own), body)
        return self._kinds[own]

    def put_back(self) -> None:
        """The layers are of the classes again that they were of."""
        for layer, found in self._found:
            layer.__class__ = found
        self._found = []


class _Joined(nn.SyncBatchNorm):
    """What a layer is while a fit goes on: of a class made from this one and ``own``, its own."""

    norms: Norms
    own: Any
    process_group = None

    def _check_input_dim(self, input: Tensor) -> None:
        self.own._check_input_dim(self, input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced  # a copy, such as a moving average or a file has, is a layer as any other
        return object.__new__, (self.own,), *rest  # what reads the file needs none of our names

    def forward(self, input: Tensor) -> Tensor:
        norms = self.norms
        if not (norms.on and self.training):
            return self.own.forward(self, input)  # type: ignore[no-any-return]
        if norms.full and not input.is_cpu:
            return super().forward(input)  # in torch's own kernels
        self._check_input_dim(input)
        tracked = (self.running_mean, self.running_var, self.num_batches_tracked) if self.track_running_stats else None
        given = (input, self.weight, self.bias, tracked, self.momentum, self.eps, norms.counts)
        return _OverRanks.apply(*given)  # type: ignore[no-any-return, no-untyped-call]


class _OverRanks(torch.autograd.Function):
    """Batch norm of ``x`` by the moments over all ranks; an ``x`` that does not count is normalised, but not in them.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167); the sums in it, and in its gradient, are over the samples of all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, tracked: Any, momentum: Any, eps: float, counts: bool
    ) -> Any:
        kind = torch.promote_types(x.dtype, torch.float32)
        own = x.numel() // x.size(1) if counts else 0
        told = torch.zeros(2 * x.size(1) + 1, dtype=torch.float64, device=x.device)
        if own:
            var, mean = (m.double() for m in torch.var_mean(x.to(kind), _dims(x), correction=0))
            told.copy_(torch.cat([mean, var + mean.square(), mean.new_ones(1)])).mul_(own)
        _sum(told)
        n = float(told[-1])
        if n == 1:  # on all ranks: torch raises its own error
            F.batch_norm(x.new_empty(1, x.size(1)), None, None, training=True)
        mean, square = (told[:-1] / max(n, 1)).chunk(2)
        var = (square - mean.square()).clamp_min_(0) if n else torch.ones_like(mean)
        if tracked is not None and n:  # else all ranks have left this batch out
            _track(tracked, momentum, mean, var * (n / (n - 1)))
        mean, var = mean.to(kind), var.to(kind)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.n = n if counts else 0
        weight, bias = (None if one is None else one.to(kind) for one in (weight, bias))
        return F.batch_norm(x.to(kind), mean, var, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        wanted, shape = ctx.needs_input_grad, [-1, *[1] * (x.dim() - 2)]
        dy = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight, dx = dy.sum(_dims(x)), (dy * normed).sum(_dims(x)), None
        if wanted[0]:
            told = torch.stack([of_bias, of_weight]).double()
            _sum(told if ctx.n else told.zero_())
            if ctx.n:
                first, second = (told / ctx.n).to(mean.dtype)
                dy = dy - first.view(shape) - normed * second.view(shape)
            dx = (dy * (scale if weight is None else scale * weight).view(shape)).to(x.dtype)
        return dx, of_weight if wanted[1] else None, of_bias if wanted[2] else None, *[None] * 4


def _dims(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def _sum(told: Tensor) -> None:
    dist.all_reduce(told)
    hold(told)


def _track(tracked: Any, momentum: float | None, new_mean: Tensor, new_var: Tensor) -> None:
    """Move the running statistics towards those of a batch; without ``momentum`` they are the mean over all batches."""
    mean, var, count = tracked
    if count is not None:
        count.add_(1)
    share = 1 / float(count) if momentum is None else momentum
    mean.lerp_(new_mean.to(mean.dtype), share)
    var.lerp_(new_var.to(var.dtype), share)
