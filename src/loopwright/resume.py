"""Where a fit goes on from: which checkpoint, in which folder, and whether it can be the same run to the bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from loopwright.bodies import edited
from loopwright.checkpoint import Contents, find, list_checkpoints, newest, read, snapshot, sweep
from loopwright.checkpoint.manifest import parse
from loopwright.checkpoint.places import Place, as_place
from loopwright.compared import Differences, compared
from loopwright.data import changes, fingerprint
from loopwright.data.trained_on import TrainedOn
from loopwright.errors import CheckpointError, DataError, SettingError, choose
from loopwright.events import fire
from loopwright.folder import hold, newest_folder
from loopwright.parallel import Single
from loopwright.resolved import resolved
from loopwright.stages import nothing_left, reopen
from loopwright.state import Comm, Run, has_state
from loopwright.written import warn

__all__ = ["Point", "Resume", "find_point"]

How = Literal["exact", "approximate", "weights"]
_ALONE: Comm = Single()
_LOADING = re.compile(r"stages/[^/]+/data/")  # settings of which the data itself tells more


@dataclass(frozen=True, slots=True)
class Resume:
    """What ``fit(resume=...)`` goes on from, and how strictly.

    ``path``: a checkpoint, the folder of a run, or "auto": the newest good checkpoint of the newest run of this name
    (``Trainer(folder=, name=)``), a new run where there is none. ``how``: "exact" refuses what could not give the bits
    of a run that was never stopped; "approximate" goes on all the same; "weights" takes the weights only and begins a
    new run. ``fit(resume="auto")``, ``"approximate"``, ``"weights"`` and ``fit(resume=path)`` are short for these.

    A run goes on in its own folder, and its records after the checkpoint are cut. From a checkpoint that is not the
    newest of its run, a new folder is begun and nothing is cut. Raises SettingError for an unknown ``how``.

    >>> Resume("runs/digits/20260101-120000-abc123", how="approximate").how
    'approximate'
    """

    path: Place | str = "auto"
    how: How = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.path, bool):
            raise SettingError(f"resume={self.path}: expected 'auto', a path or None, such as resume='auto'")
        if self.how not in get_args(How):
            raise SettingError(f"Resume(how={self.how!r}) is unknown. {choose(self.how, get_args(How))}")


@dataclass(slots=True)
class Point:
    """A checkpoint that has been found and read, and the folder in which its run goes on (None: a new one)."""

    data: Contents
    how: How
    folder: Path | None
    auto: bool
    reasons: list[str] = field(default_factory=list)
    settings: Differences = field(default_factory=lambda: Differences([], [], []))
    edits: list[str] = field(default_factory=list)

    @property
    def key(self) -> int | None:
        """The key of the streams of the saved run; a new process would choose another. None to begin anew."""
        return None if self.how == "weights" else self.data.state.get("recipe", {}).get("key")

    def check(self, run: Run) -> None:
        """Raise CheckpointError for what does not fit ``run``; changes nothing.

        So it does for what cannot go on exactly, as far as that can be told without the order of the data.
        """
        if self.how == "weights":
            snapshot.check_models(run, self.data)
            return
        self._check_fit(run)
        self._refuse(self._compare(run, []))

    def _check_fit(self, run: Run) -> None:
        if "progress" not in self.data.state:
            raise CheckpointError(
                f"{self.data.path} holds weights and nothing to go on with. Begin with them: fit(..., "
                f"resume=lw.Resume({str(self.data.path)!r}, how='weights'))"
            )
        snapshot.check_fit(run, self.data)

    def _refuse(self, reasons: list[str]) -> None:
        if reasons and self.how == "exact":
            listed = "".join(f"\n  - {reason}" for reason in reasons)
            again, weights = (
                repr(how) if self.auto else f"lw.Resume({str(self.data.path)!r}, how={how!r})"
                for how in ("approximate", "weights")
            )
            raise CheckpointError(
                f"{self.data.path} cannot be resumed with the same bits:{listed}\nMend that; or begin another run, "
                f"resume=None, also from these weights, resume={weights}; or go on all the same: "
                f"fit(..., resume={again})"
            )

    def prepare(self, run: Run) -> None:
        """Let ``run``, whose stages and optimizers are ready, begin at this point; before anything is opened.

        Raises CheckpointError for what does not fit, and for what cannot go on exactly, with all reasons.
        """
        if self.how == "weights":
            snapshot.restore_models(run, self.data)
            return
        self._check_fit(run)
        state = self.data.state
        resolved(run)  # as they were made: what the checkpoint holds is not in the data yet
        self.reasons = self._compare(run, list(self._order(run)))
        self._refuse(self.reasons)
        if not run.comm.rank:
            self._warn()
        run.progress, run.stage_start = snapshot.progress(self.data), snapshot.progress(self.data, "stage_start")
        run.stage_ended_at = state["counters"].get("stage_ended_at")
        run.history.load_state_dict(state["history"])
        run.metrics.update(state["metrics"])
        run.schema = TrainedOn.from_dict(state["data"]).schema
        run.folder, run.resumed_from, run.restore = self.folder, self.data.path, lambda: self.restore(run)
        snapshot.restore_loggers(run, self.data)
        if self.auto:
            run.stop_reason = state["stop_reason"]
        self._open(run)

    def finished(self, run: Run) -> bool:
        """True if the run had come to its end, last validation and records included: there is nothing left to do."""
        ended = self.how != "weights" and self.data.state["ended"]
        return bool(ended) and (run.stop_reason is not None or nothing_left(run))

    def restore(self, run: Run) -> None:
        """Put all that the checkpoint holds into ``run``, the random generators last."""
        snapshot.restore(run, self.data)
        self._open(run)

    def end(self, run: Run) -> None:
        """Leave ``run`` as it ended, with its weights.

        A callback may make in ``on_fit_start`` what its state goes into; those that remember nothing are not called.
        Those that decide the weights at the end of a fit (``put_back``) do so again.
        """
        kept = snapshot.remembering(run, self.data)
        fire(tuple(h for h in run.hooks.on_fit_start if any(getattr(h, "__self__", None) is c for c in kept)), run)
        snapshot.restore(run, self.data)
        for saver in run.savers:
            saver.end(run)
        for callback in (c for c in kept if hasattr(c, "put_back")):
            callback.put_back(run)
        run.status = "stopped" if run.stop_reason else "done"
        run.task.__dict__["_run"] = run
        TrainedOn.forget((run.task, *run.models.values()))
        TrainedOn.leave(run)

    def _open(self, run: Run) -> None:
        """Open the stage that is to go on: the last one again, or one that was added to a run that had ended."""
        ended = run.progress.stage > self.data.state["stage"]["index"]
        if ended and run.stage is not None:
            run.stage_start, run.stage_ended_at = run.progress, None
        reopen(run)

    def _compare(self, run: Run, order: list[str]) -> list[str]:
        """Why the bits could be others than those of the run that was never stopped; ``order``: what its data says."""
        told: list[list[str]] = [exact for exact in (self.data.info["exact"], run.exact) if isinstance(exact, list)]
        saved = self.data.state["data"]["fingerprint"]
        others = changes(saved, fingerprint(run.data)) if saved is not None else []
        data = [*(others or _other_columns(run, self.data.state["data"])), *order]
        now = snapshot.conditions(run)
        conditions = [f"{name} was {was!r} and is {now[name]!r}" for name, was in self.data.state["conditions"].items()
                      if name in now and now[name] != was]  # fmt: skip
        state = self.data.state
        self.settings, (lambdas, self.edits) = run.comm.first(
            lambda: (compared(state["recipe"], resolved(run)), edited(state.get("code", {}), run.code))
        )
        decides = [one for one in self.settings.decides if not (data and _LOADING.match(one))]
        inexact = dict.fromkeys(why for exact in told for why in exact)
        return [*inexact, *data, *conditions, *self._stages(run), *decides, *lambdas]

    def _stages(self, run: Run) -> Iterator[str]:
        """Stages that were begun in the saved run, and that this one has not, or not in their order."""
        begun = list(self.data.state["recipe"].get("stages", ()))[: self.data.state["stage"].get("index", 0) + 1]
        now = [stage.name for stage in run.stages]
        if begun != now[: len(begun)]:
            yield f"the stages began with {', '.join(map(repr, begun))} and are {', '.join(map(repr, now))}"

    def _warn(self) -> None:
        """Tell of what may be another run from here on, or is measured in another way; once, at the call of ``fit``."""
        step = self.data.info["step"]
        told = [f"{'; '.join(self.edits)}: not as it was when {self.data.path} was written. If what it computes has "
                "changed, the rest of the run is another one"] if self.edits else []  # fmt: skip
        told += [f"what is measured from step {step} on cannot be compared with what was measured before: "
                 f"{'; '.join(self.settings.measures)}"] if self.settings.measures else []  # fmt: skip
        if told:
            warn(f"the run goes on, but {'. And '.join(told)}")

    def _order(self, run: Run) -> Iterator[str]:
        """Why the order of the data could be another one; the source stands at the checkpoint afterwards."""
        state, stage = self.data.state["stage"], run.stages[min(self.data.state["stage"]["index"], len(run.stages) - 1)]
        if not has_state(stage.source):
            return
        try:
            stage.source.load_state_dict(state["source"])
        except (CheckpointError, DataError) as error:
            yield str(error)
            state["source"] = None
        else:
            if self.how == "approximate" and isinstance(order := state["source"].get("order"), dict):
                order["digest"] = None  # a sampler that does not repeat itself is accepted


def _other_columns(run: Run, saved: Mapping[str, Any]) -> list[str]:
    """What a fingerprint may have left out: it tells the first 100 columns."""
    try:
        TrainedOn.from_dict(saved).check(run.stages[0].source, "train")
    except DataError as error:
        return [str(error)]
    return []


def find_point(
    wanted: Resume | Place | str, root: str | Path | None, label: str, *, elsewhere: Sequence[Place] = (),
    comm: Comm = _ALONE, mesh: Any = None, tidy: bool = True,
) -> Point | None:  # fmt: skip
    """The checkpoint that ``wanted`` means for a run called ``label`` in ``root``, read; None to begin anew.

    ``mesh``: of the ranks, where parameters are shared out over them: each reads its part.

    ``elsewhere``: other folders in which savers of this run write. ``tidy`` removes what an interrupted write has left
    in the folder. A damaged checkpoint is passed over with a warning
    when an older good one of the same run is there. Raises CheckpointError when there is none, and SettingError when
    another process is training in that folder.
    """
    if not isinstance(wanted, Resume):
        wanted = Resume(how=wanted) if wanted in ("approximate", "weights") else Resume(wanted)  # type: ignore[arg-type]
    point: Point | None = None

    def look() -> tuple[Any, ...] | None:
        nonlocal point
        point = _find(wanted, root, label, elsewhere, mesh, tidy)
        return None if point is None else (point.data.path, point.folder)

    found = comm.first(look)
    if found is not None and comm.rank:  # what rank 0 has found
        path, folder = found
        point = Point(read(path, mesh), wanted.how, folder, wanted.path == "auto")
    return point


def _find(
    wanted: Resume, root: str | Path | None, label: str, elsewhere: Sequence[Place], mesh: Any, tidy: bool
) -> Point | None:
    auto = wanted.path == "auto"
    if auto:
        if root is None and not elsewhere:
            said = "auto" if wanted.how == "exact" else wanted.how
            raise SettingError(
                f"resume={said!r} needs the folder of the run: leave folder=None out, or give a path to resume from"
            )
        owner = None if root is None else newest_folder(root, label)
        places = ([] if owner is None else [owner / "checkpoints"]) + list(elsewhere)
    else:
        path = as_place(wanted.path)
        words = ("approximate", "auto", "weights")
        if isinstance(wanted.path, str) and get_close_matches(wanted.path.lower(), words, n=1) and not path.exists():
            raise SettingError(f"resume={wanted.path!r} is no path, and no known word. {choose(wanted.path, words)}")
        if (path / "manifest.json").is_file():
            own = _owner(path.parent) if root is not None and newest(path.parent) == path else None
            return Point(read(path, mesh), wanted.how, own, auto)
        places = [find(path).parent]
        owner = _owner(places[0])
    if owner is not None and tidy and wanted.how != "weights":
        with hold(owner):  # what is being written there is not ours to sweep
            sweep(owner / "checkpoints")
    found = [data for place in places if (data := _newest_good(place, mesh)) is not None]
    if not found:
        return None
    return Point(max(found, key=lambda data: data.info["step"]), wanted.how, owner if root is not None else None, auto)


def _owner(folder: Place) -> Path | None:
    """The folder of the run whose checkpoints are in ``folder``."""
    owner = folder.parent
    return owner if isinstance(owner, Path) and (owner / "run.json").is_file() else None


def _newest_good(folder: Place, mesh: Any) -> Contents | None:
    """The newest checkpoint in ``folder`` that can be read; None where there is none at all."""
    bad, data = list[str](), None
    for path in reversed(list_checkpoints(folder)):
        try:
            if data is None:
                data = read(path, mesh)
            else:
                parse(path)  # one whose manifest is damaged has lost its place in the order, and may be newer
        except CheckpointError as error:
            bad.append(str(error))
    if data is not None:
        if bad:
            warn(f"{'; '.join(bad)}. Going on from {data.path}")
        return data
    if bad:
        listed = "".join(f"\n  - {text}" for text in bad)
        raise CheckpointError(f"no checkpoint in {folder} can be read:{listed}\nTo begin anew: fit(..., resume=None)")
    return None
