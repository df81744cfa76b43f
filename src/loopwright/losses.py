"""Several losses as one, each logged by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.errors import SettingError, StepOutputError, choose
from loopwright.events import describe

__all__ = ["Weighted"]


class Weighted(nn.Module):
    """The weighted sum of named losses, for ``lw.Supervised(net, loss=Weighted({...}))``.

    Each loss is called with ``(preds, target)``. With ``by_name=True`` the preds and the target are mappings (those of
    a net with several heads), and each loss gets what they hold under its name. ``weights`` gives the factor of a loss,
    by name; 1 where it names none. Called, it returns a dict: ``loss``, and each term before its weight, which are
    logged as ``train/<name>`` and ``valid/<name>``.

    Raises SettingError for names that do not go together and weights that are not finite, and StepOutputError for
    preds or a target without a name.

    >>> import torch
    >>> loss = Weighted({"mse": nn.MSELoss(), "l1": nn.L1Loss()}, {"l1": 0.5})
    >>> {name: value.item() for name, value in loss(torch.full((2,), 3.0), torch.ones(2)).items()}
    {'loss': 5.0, 'mse': 4.0, 'l1': 2.0}
    """

    def __init__(
        self,
        losses: Mapping[str, Callable[..., Tensor]],
        weights: Mapping[str, float] | None = None,
        *,
        by_name: bool = False,
    ) -> None:
        super().__init__()
        if not losses or not all(callable(loss) for loss in losses.values()):
            raise SettingError(f"Weighted({dict(losses)!r}): expected losses by name, functions of (preds, target)")
        for name in weights or ():
            if name not in losses:
                raise SettingError(f"weights has {name!r}, which is no loss. {choose(name, losses)}")
        for name, weight in (weights or {}).items():
            if not isinstance(weight, (int, float, Tensor)) or not torch.as_tensor(weight).isfinite().all():
                raise SettingError(f"the weight of the loss {name!r} is {weight!r}: expected a finite number")
        for name in losses:
            if name in ("loss", "preds", "target") or "." in name or hasattr(nn.Module, name):
                raise SettingError(f"a loss cannot be named {name!r}; call it something else")
        self.terms, self.by_name = dict(losses), by_name
        self.weights = {name: (weights or {}).get(name, 1.0) for name in losses}
        for name, loss in losses.items():
            if isinstance(loss, nn.Module):
                self.add_module(name, loss)  # it may have buffers to move, and a state to save

    def forward(self, preds: Any, target: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        total: Any = None
        for name, loss in self.terms.items():
            given = (_named(preds, name, "preds"), _named(target, name, "target")) if self.by_name else (preds, target)
            found[name] = loss(*given)
            weight = self.weights[name]
            part = found[name] if weight == 1 else weight * found[name]
            total = part if total is None else total + part
        return {"loss": total, **found}


def _named(value: Any, name: str, what: str) -> Any:
    try:
        return value[name]
    except (KeyError, TypeError, IndexError):
        known = value if isinstance(value, Mapping) else ()
        raise StepOutputError(
            f"the loss {name!r} looks for its {what} by name, in {describe(value)}. {choose(name, known)}"
        ) from None
