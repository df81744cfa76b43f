"""Weight penalties: a function of the parameters added to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from loopwright.errors import SettingError, choose
from loopwright.events import Callback
from loopwright.optim import match_names
from loopwright.state import Phase, Run

__all__ = ["Penalty"]

_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda weight: weight.abs().sum(),
    "l2": lambda weight: weight.square().sum() / 2,
}


class Penalty(Callback):
    """Adds ``strength`` times the sum of ``kind`` over the parameters that ``parameters`` matches to the loss.

    ``kind``: ``"l1"``, the sum of absolute values; ``"l2"``, half the sum of squares, whose gradient is that of
    ``SGD(weight_decay=strength)``; or a function of a parameter that returns a scalar tensor. ``parameters``:
    name patterns, such as ``"*.weight"``; of those only what a phase moves and what trains is penalised. The term is
    logged as ``train/penalty_l1``, and ``train/loss`` includes it; the loss of validation does not. A window of several
    batches is penalised once, and clipping sees the whole gradient.

    Reads: parameters. Changes: the loss. Stops: no. Raises SettingError for an unknown kind, a strength that is not
    above 0, and at the start for patterns that match nothing.
    Source: l1, Tibshirani 1996 (doi:10.1111/j.2517-6161.1996.tb02080.x).

    >>> Penalty("l1", 1e-4, parameters="*.weight").name
    'penalty_l1'
    """

    def __init__(
        self, kind: str | Callable[[Tensor], Tensor], strength: float, *, parameters: str | Sequence[str] = "*"
    ) -> None:
        if isinstance(kind, str) and kind not in _KINDS:
            raise SettingError(f"Penalty({kind!r}) is unknown; give a function of a parameter. {choose(kind, _KINDS)}")
        if not isinstance(kind, str) and not callable(kind):
            raise SettingError(f"Penalty({kind!r}) cannot be called; pass 'l1', 'l2' or a function of a parameter")
        if not strength > 0:
            raise SettingError(f"Penalty(strength={strength!r}): expected a number above 0")
        self.kind, self.strength, self.parameters = kind, strength, parameters
        self.name = f"penalty_{kind if isinstance(kind, str) else getattr(kind, '__name__', 'own')}"
        self._of = _KINDS[kind] if isinstance(kind, str) else kind
        self._known: dict[str, list[Tensor]] = {}
        self._at: tuple[Any, int] = (None, 0)

    def on_fit_start(self, run: Run) -> None:
        if run.team is not None and run.team.shards:
            raise SettingError("Penalty cannot add up weights that FSDP shares out; use weight_decay of the optimizer")
        self._resolve(run)

    def map_output(self, run: Run, output: Any, batch: Any, phase: Phase) -> Any:
        if not phase.moved:
            return output
        if self._at != (run.progress.stage, len(run.replaced)):
            self._resolve(run)
        weights = [weight for weight in self._known[phase.name] if weight.requires_grad]
        if not weights:
            return output
        terms = iter(weights)
        total = self._of(next(terms))
        for weight in terms:
            total = total + self._of(weight)
        penalty = self.strength * total
        shown = penalty.detach() + output.get(self.name, 0.0)  # there may be another one of this kind
        return {**output, "loss": output["loss"] + penalty, self.name: shown}

    def _resolve(self, run: Run) -> None:
        """Which parameters of which phase; done again where a stage begins, or something was replaced."""
        task: nn.Module = run.task
        if not isinstance(task, nn.Module):
            raise SettingError("Penalty cannot apply to a step that does all the work; add it to the loss there")
        named = dict(task.named_parameters())
        chosen = {id(named[name]) for name in match_names(self.parameters, named)}
        stage = run.stages[min(run.progress.stage, len(run.stages) - 1)]
        self._known = {phase.name: [p for p in phase.parameters() if id(p) in chosen] for phase in stage.phases}
        self._at = (run.progress.stage, len(run.replaced))
