"""Who changed the loss at step 120: the last steps of a run, with each edit of a callback or handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from loopwright.callbacks.audit import differences, gradients, leaves, slots_of
from loopwright.errors import SettingError, choose
from loopwright.events import Callback, hook_name
from loopwright.state import Phase, Run

__all__ = ["Changes"]

_WRITES = {"map_batch": "batch", "map_output": "output", "map_loss": "loss", "on_grads_ready": "gradients"}


class Changes(Callback):
    """Remembers who has changed batch, output, loss and gradients in the last ``steps`` steps.

    ``who_changed("loss", step=120)`` answers afterwards, or in the middle of a run, in the order in which it happened.
    The loss is kept before and after each edit; of the others, which parts were changed, seen by 256 elements of each.
    ``trainer.explain(..., of="loss")`` tells who may, before anything runs; this tells who did. For a run that is
    looked into: each edit costs some tens of us, a run without it nothing.

    Reads: what hooks are given and return. Changes: nothing. Stops: no.

    >>> class Half(Callback):
    ...     def map_loss(self, run, loss, output, batch, phase):
    ...         return loss / 2
    >>> import loopwright as lw, torch
    >>> net = torch.nn.Linear(1, 1)
    >>> ones = lambda preds, target: target.mean() + 0 * preds.mean()
    >>> task = lw.Supervised(net, ones, torch.optim.SGD(net.parameters()))
    >>> changes = Changes()
    >>> trainer = lw.Trainer(steps=3, callbacks=[Half(), changes], folder=None, progress=False)
    >>> run = trainer.fit(task, [(torch.ones(1, 1), torch.ones(1))])
    >>> changes.who_changed("loss", step=2)
    ['Half.map_loss: 1 -> 0.5']
    """

    def __init__(self, steps: int = 200) -> None:
        if type(steps) is not int or steps < 1:
            raise SettingError(f"Changes(steps={steps!r}): expected how many steps to remember, from 1")
        self.steps = steps
        self._ring: dict[int, list[tuple[str, str, _How]]] = {}  # by step: what, who, and how
        self._first, self._last = 1, 0  # steps of this fit

    def on_fit_start(self, run: Run) -> None:
        self._ring, self._first, self._last = {}, run.progress.step + 1, run.progress.step
        run.hooks.wrap(lambda hook, function: self._watched(hook, function, run) if hook in _WRITES else function)

    def who_changed(self, name: str, *, step: int) -> list[str]:
        """The edits of "batch", "output", "loss" or "gradients" in the ``step``-th step, in their order.

        Raises SettingError for another name, and for a step that is not remembered.
        """
        if name not in _WRITES.values():
            raise SettingError(f"who_changed({name!r}): nothing here is called so. {choose(name, _WRITES.values())}")
        first, last = max(self._first, self._last + 1 - self.steps), max([self._last, *self._ring])
        if not first <= step <= last:
            kept = f"{first} to {last}" if first <= last else "none yet"
            raise SettingError(f"who_changed(step={step!r}) is not remembered (steps {kept}); Changes(steps=...) more")
        found = [(who, how) for value, who, how in self._ring.get(step, ()) if value == name]
        return [f"{who}: {text}" for who, how in found if (text := _in_words(how))]

    def on_step_end(self, run: Run, result: Any) -> None:
        self._last = run.progress.step
        self._ring.pop(self._last - self.steps, None)

    def _watched(self, hook: str, function: Callable[..., Any], run: Run) -> Callable[..., Any]:
        what, who = _WRITES[hook], hook_name(function, run)

        def call(run: Run, *given: Any) -> Any:
            before = _state(what, given[0], run)
            returned = function(run, *given)
            after = _state(what, returned, run)
            how = (before, after) if what == "loss" else differences(before, after)  # which hold no batch
            stage, phase = run.stage, next((one for one in given if isinstance(one, Phase)), None)
            where = (
                f", phase {phase.name!r}" if phase is not None and stage is not None and len(stage.phases) > 1 else ""
            )
            self._ring.setdefault(run.progress.step + 1, []).append((what, who + where, how))
            return returned

        return call


_How = tuple[Tensor, Tensor] | list[str]


def _state(what: str, value: Any, run: Run) -> Any:
    """What is compared of a value; the loss stays on its device until somebody asks."""
    if what == "loss":
        return value.detach().clone()
    return gradients(slots_of(run), {}) if what == "gradients" else dict(leaves(value, what))


def _in_words(how: _How) -> str:
    """The loss before and after, or which parts were changed; nothing where none was."""
    if isinstance(how, list):
        return ", ".join(how)
    before, after = how
    return "" if before.equal(after) else f"{before.item():.6g} -> {after.item():.6g}"
