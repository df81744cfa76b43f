"""The usual step functions of ``Stepwise``: each is the definition of its paper, on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loopwright.optim.bunch import Bunch

__all__ = ["adam", "decay", "lamb", "lookahead", "radam", "sgd"]

Betas = tuple[float, float]


def decay(bunch: Bunch, lr: float, weight_decay: float = 0.0, decoupled_weight_decay: bool = False) -> None:
    """Weight decay: added to the gradient, or, if decoupled, taken from the weights themselves (AdamW).

    Put it before the function that moves: ``[decay, adam]`` is torch's Adam, and with
    ``decoupled_weight_decay=True, weight_decay=0.01`` its AdamW.
    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101).

    >>> from loopwright.optim import Stepwise, adam
    >>> net = torch.nn.Linear(2, 1)
    >>> Stepwise(net.parameters(), [decay, adam], weight_decay=0.1).defaults["weight_decay"]
    0.1
    """
    if not weight_decay:
        return
    if decoupled_weight_decay:
        torch._foreach_mul_(bunch.params, 1 - lr * weight_decay)
    else:
        bunch.grads = list(torch._foreach_add(bunch.grads, bunch.params, alpha=weight_decay))


def sgd(bunch: Bunch, lr: float, momentum: float = 0.0, nesterov: bool = False) -> None:
    """Stochastic gradient descent with momentum, as torch has it: the bits of ``torch.optim.SGD``.

    Source: Sutskever et al. 2013 (ICML), in torch's form, where the velocity is not scaled by the learning rate.

    >>> from loopwright.optim import Stepwise
    >>> Stepwise(torch.nn.Linear(2, 1).parameters(), [sgd], lr=0.1).defaults["momentum"]
    0.0
    """
    updates = bunch.grads
    if momentum:
        updates = bunch.kept("momentum_buffer")
        torch._foreach_mul_(updates, momentum)
        torch._foreach_add_(updates, bunch.grads)
        if nesterov:
            updates = list(torch._foreach_add(bunch.grads, updates, alpha=momentum))
    bunch.descend(updates, lr)


def adam(bunch: Bunch, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> None:
    """Adam. Source: Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1.

    >>> from loopwright.optim import Stepwise
    >>> Stepwise(torch.nn.Linear(2, 1).parameters(), [adam]).defaults["lr"]
    0.001
    """
    m, v = bunch.average("exp_avg", betas[0]), bunch.average_square("exp_avg_sq", betas[1])
    bunch.descend(m, lr, beta=betas[0], over=bunch.root(v, eps, beta=betas[1]))


def radam(bunch: Bunch, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> None:
    """Rectified Adam: momentum alone until the variance can be told. Source: Liu et al. 2020 (arXiv:1908.03265).

    ``eps`` is added before the bias is taken out, as ``torch.optim.RAdam`` has it.

    >>> from loopwright.optim import Stepwise, decay
    >>> Stepwise(torch.nn.Linear(2, 1).parameters(), [decay, radam], lr=1e-2).defaults["steps"]
    'decay, radam'
    """
    m, v = bunch.average("exp_avg", betas[0]), bunch.average_square("exp_avg_sq", betas[1])
    parts: list[Any] = [_rectified(step, betas[1]) for step in bunch.steps]
    in_graph = isinstance(parts[0], Tensor)
    if in_graph or any(parts):
        bunch.descend(m, [lr * part for part in parts], beta=betas[0], over=bunch.root(v, eps))
    if in_graph or not all(parts):
        bunch.descend(m, [lr * (part == 0) for part in parts], beta=betas[0])


def _rectified(step: Any, beta: float) -> Any:
    """The rectification times the root of ``1 - beta ** step``; 0 while the variance has no estimate."""
    longest, missing = 2 / (1 - beta) - 1, 1 - beta**step
    length = longest - 2 * step * beta**step / missing
    if not isinstance(length, Tensor) and length <= 5:
        return 0.0
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length) * missing
    if isinstance(length, Tensor):
        share = torch.where(length > 5, share, torch.zeros_like(share))
    return share**0.5


def lamb(
    bunch: Bunch, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0
) -> None:
    """LAMB: Adam whose step has, for each tensor, the length of its weights times ``lr``; for large batches.

    The trust ratio is ``|w| / |update|``, and 1 where either is 0; the decay belongs to the update.
    Source: You et al. 2020 (arXiv:1904.00962), algorithm 2 with the identity as its scaling function.

    >>> from loopwright.optim import Stepwise
    >>> Stepwise(torch.nn.Linear(2, 1).parameters(), [lamb], weight_decay=0.01).defaults["weight_decay"]
    0.01
    """
    m, v = bunch.average("exp_avg", betas[0]), bunch.average_square("exp_avg_sq", betas[1])
    updates = torch._foreach_div(m, bunch.missing(betas[0]))
    torch._foreach_div_(updates, bunch.root(v, eps, beta=betas[1]))
    torch._foreach_add_(updates, bunch.params, alpha=weight_decay)
    bunch.descend(updates, [lr * ratio for ratio in trust(bunch.params, updates)])


def trust(weights: Any, updates: Any) -> list[Tensor]:
    """``|w| / |update|`` of each tensor, 0-dimensional; 1 where either is 0."""
    pairs = zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
    return [torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in pairs]


def lookahead(*steps: Callable[..., None]) -> list[Callable[..., None]]:
    """``steps`` as the fast part of Lookahead: each ``k`` steps the slow weights go ``alpha`` of the way to the fast.

    The fast weights go on from there. The slow ones are kept as ``slow`` and start with the first step's weights.
    Hyper-parameters: ``k=5``, ``alpha=0.5``. ``lookahead(decay, radam)`` is Ranger.
    Source: Zhang et al. 2019 (arXiv:1907.08610), algorithm 1.

    >>> from loopwright.optim import Stepwise, adam
    >>> Stepwise(torch.nn.Linear(2, 1).parameters(), lookahead(adam), k=6).defaults["steps"]
    'slow, adam, follow'
    """
    return [_slow, *steps, follow]


def _slow(bunch: Bunch) -> None:
    bunch.kept("slow", start=bunch.params)


def follow(bunch: Bunch, k: int = 5, alpha: float = 0.5) -> None:
    """The other half of ``lookahead``: the slow weights go towards the fast ones, which go on from there."""
    slow = bunch.kept("slow")
    due: list[Any] = [step % k == 0 for step in bunch.steps]
    if isinstance(due[0], Tensor):  # in a graph nothing may depend on a number
        shares = [one.to(w.dtype) for one, w in zip(due, slow, strict=True)]
        torch._foreach_lerp_(slow, bunch.params, [alpha * share for share in shares])
        torch._foreach_lerp_(bunch.params, slow, shares)
    elif any(due):
        ours = [w for w, one in zip(slow, due, strict=True) if one]
        fast = [w for w, one in zip(bunch.params, due, strict=True) if one]
        torch._foreach_lerp_(ours, fast, alpha)
        torch._foreach_lerp_(fast, ours, 1.0)  # all the way: DTensor has no _foreach_copy_
