"""Single samples with what a model says of them: labelled images in a notebook, a DataFrame of texts or rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loopwright.errors import MetricError, SettingError
from loopwright.events import Callback, describe
from loopwright.report.markup import Markup, el
from loopwright.report.samples import Samples, misnamed
from loopwright.report.shown import class_name, samples_shown
from loopwright.state import Run
from loopwright.trainer import Trainer

if TYPE_CHECKING:
    import pandas

__all__ = ["Results", "results"]

_STYLE = (
    ".lw-results .cards{display:flex;flex-wrap:wrap;gap:12px}.lw-results figure{margin:0;width:120px}"
    ".lw-results .texts figure{width:320px}.lw-results img{width:100%;image-rendering:pixelated}"
    ".lw-results blockquote{margin:0 0 4px}.lw-results .warn{color:#c0182b}.lw-results .good{color:#1a7f4b}"
)


@dataclass(slots=True)
class Results:
    """The samples on which a model was worst and best, each a dict, and what a test has measured.

    A sample has ``n`` (its position in the data), ``target``, ``guess``, for classes ``p`` (the probability of the
    target), and ``text``, ``image`` (a PNG in base64) or ``row``, whichever its input is.

    >>> found = Results({"loss": 0.7}, worst=[{"n": 3, "target": "cat", "guess": "dog", "p": 0.1, "text": "miaow"}])
    >>> found.worst[0]["guess"]
    'dog'
    """

    metrics: dict[str, float]
    worst: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def to_pandas(self) -> pandas.DataFrame:
        """A line a sample, the worst first: its text or the columns of its row, target and prediction.

        Needs pandas: ``pip install "loopwright[pandas]"``.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError('results.to_pandas() needs pandas: pip install "loopwright[pandas]"') from error
        known = {one["n"] for one in self.worst}
        rest = [one for one in reversed(self.best) if one["n"] not in known]
        return pandas.DataFrame([self._line(one) for one in (*self.worst, *rest)])

    def _line(self, one: dict[str, Any]) -> dict[str, Any]:
        names = [self.columns[i] if i < len(self.columns) else f"x{i}" for i in range(len(one.get("row", ())))]
        shown = {"text": one["text"]} if "text" in one else dict(zip(names, one.get("row", ()), strict=True))
        if "p" not in one:
            return {"n": one["n"], **shown, "target": _alone(one["target"]), "prediction": _alone(one["guess"])}
        said = {"target": class_name(one["target"], self.classes), "prediction": class_name(one["guess"], self.classes)}
        return {"n": one["n"], **shown, **said, "probability of target": one["p"]}

    def _repr_html_(self) -> str:
        part = {"worst": self.worst, "best": self.best, "columns": self.columns}
        shown = [[el("h4", key), samples_shown(part, key, self.classes)] for key in ("worst", "best") if part[key]]
        return str(el("div", el("style", Markup(_STYLE)), shown, class_="lw-results"))


def results(
    task: Any,
    data: Any,
    *,
    keep: int = 12,
    classes: Sequence[str] = (),
    columns: Sequence[str] = (),
    show: Callable[[Any], Any] | None = None,
) -> Results:
    """Test ``task`` on ``data`` and return the ``keep`` samples on which it is worst, and as many on which it is best.

    The last line of a notebook's cell, it is shown as labelled images, as texts, or as a table; ``to_pandas()`` has the
    same as a DataFrame. ``classes``, ``columns`` and ``show`` are those of ``lw.Report``. Raises MetricError where the
    test step returns no predictions and targets that are understood, SettingError for names that do not fit them,
    and for a ``show`` that gives another number than there are samples.

    >>> import torch, loopwright as lw
    >>> from torch import nn
    >>> task = lw.Supervised(nn.Identity(), nn.CrossEntropyLoss())
    >>> data = [(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))]
    >>> found = results(task, data, keep=1, classes=["cat", "dog"], columns=["purr", "bark"])
    >>> found.to_pandas()[["n", "purr", "target", "prediction"]].values.tolist()
    [[1, 1.0, 'dog', 'cat'], [0, 2.0, 'cat', 'cat']]
    """
    look = _Look(Samples(keep=keep, show=show, loss=getattr(task, "loss", None)))
    metrics = Trainer(folder=None, progress=False, callbacks=[look]).test(task, data)
    told = look.samples.as_dict()
    if not told:
        raise MetricError(
            f"test_step returned {look.got}, of which no samples can be shown: return 'preds' and 'target', scores "
            "[N, C] or [N] with whole numbers [N], or numbers of the same shape"
        )
    for wrong in (*look.samples.wrong, *misnamed(told, classes, columns)):
        raise SettingError(f"lw.report.results: {wrong}")
    return Results(metrics, told["worst"], told["best"], list(classes), list(columns))


class _Look(Callback):
    """Hands every batch of a test on."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.got = samples, "nothing"

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        self.got = describe(output)
        if isinstance(output, Mapping):
            self.samples.add(output, batch)


def _alone(values: list[float]) -> Any:
    return values[0] if len(values) == 1 else values
