"""What callbacks that decide the weights of a stage's end, or of the fit's, have in common: when they do so."""

from __future__ import annotations

from loopwright.conflicts import puts_back_at, stages_of
from loopwright.events import Callback
from loopwright.state import Run, Stage

__all__ = ["Restoring"]


class Restoring(Callback):
    """Puts weights into the models: where its stage ends or, among the callbacks of a Trainer, where the fit ends.

    The last stage ends with the fit, after its last checkpoint: a run that is made longer goes on from the weights of
    the training. One that a signal interrupts, to be resumed, has not ended.
    """

    def _decides(self) -> bool:
        """True if it is asked to put weights into the models at all."""
        raise NotImplementedError

    def _put_back(self, run: Run) -> None:
        """Do it."""
        raise NotImplementedError

    def _puts_back_at(self, run: Run) -> set[str]:
        """At the ends of which stages, by their names, and "" for the end of the fit."""
        mine = stages_of(run, self)
        return {"" if s is run.stages[-1] else s.name for s in mine} or {""} if self._decides() else set()

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        if stage is not run.stages[-1] and any(c is self for c in stage.callbacks):
            self._put_back(run)

    def on_fit_end(self, run: Run) -> None:
        self.put_back(run)

    def put_back(self, run: Run) -> None:
        """What is due where a run has ended, also one that had ended before and was only loaded."""
        if not run.interrupted and self._is_its_end(run) and (self._is_first(run) or not _decided(run, self)):
            self._put_back(run)

    def _is_its_end(self, run: Run) -> bool:
        """True if a fit that has ended did so in a stage of this one; always, among the callbacks of the Trainer."""
        mine = stages_of(run, self)
        return not mine or any(run.stages[min(run.progress.stage, len(run.stages) - 1)] is one for one in mine)

    def _is_first(self, run: Run) -> bool:
        """True if it decides the end of the fit, whatever else does: among the callbacks of the Trainer."""
        return not stages_of(run, self)


def _decided(run: Run, callback: Callback) -> bool:
    """True if something else of the Trainer, a callback or a Checkpoint, puts weights back where the fit ends."""
    others = [one for one in (*run.savers, *run.callbacks) if one is not callback]
    return any("" in puts_back_at(run, one) for one in others if not stages_of(run, one))
