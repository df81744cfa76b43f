"""Which way a watched value is better, and whether it got better: one rule for all that watch a value."""

from __future__ import annotations

import difflib
import math
import re
from typing import Literal

from loopwright.errors import SettingError
from loopwright.given import check_text

__all__ = ["Direction", "better", "direction", "improved"]

Direction = Literal["min", "max"]

# long words count anywhere in a name, short ones only when they stand alone
_MIN = re.compile(
    r"loss|error|perplexity|distance|deviance|divergence|brier|cross_?entropy|hamming"
    r"|(?<![a-z])(err|mse|mae|rmse|msle|mape|smape|nll|bce|ce|kl|ppl|wer|cer|per|fid|lpips|eer|ece|bpb|bpc)(?![a-z])"
)
_MAX = re.compile(
    r"accuracy|precision|recall|score|jaccard|dice|kappa|reward|correlation|pearson|spearman|specificity"
    r"|sensitivity|similarity|auroc"
    r"|(?<![a-z])(acc|auc|ap|map|f\d|fbeta|iou|miou|r2|mcc|bleu|rouge\w?|meteor|ndcg|mrr|psnr|ssim|elbo|hits?|top)(?![a-z])"
)
_COMMON = ("loss", "accuracy", "error", "precision", "recall", "score", "perplexity", "auroc", "f1", "rmse")


def better(name: str) -> Direction | None:
    """Whether smaller or larger is better for a logged name, as its last part tells; None where it does not.

    The number of a class is no part. What scikit-learn has negated, larger is better of.

    >>> better("valid/loss"), better("valid/MulticlassAccuracy"), better("lr"), better("valid/f1/0"), better("neg_mse")
    ('min', 'max', None, 'max', 'max')
    """
    last = re.sub(r"(/\d+)+$", "", name).rpartition("/")[2].lower()
    if last.startswith("neg_"):
        return "max"
    if _MIN.search(last):
        return "min"
    return "max" if _MAX.search(last) else None


def direction(monitor: str, mode: str | None = None) -> Direction:
    """``mode`` if given, else what the name of the monitored value tells.

    >>> direction("valid/loss"), direction("valid/f1"), direction("valid/profit", "max")
    ('min', 'max', 'max')

    Raises SettingError for a mode other than "min" and "max", and for a name that does not tell: a wrong
    guess would keep the worst model as the best.
    """
    check_text("monitor", monitor, "valid/loss")
    if mode not in (None, "min", "max"):
        raise SettingError(f"mode={mode!r} is unknown; use mode='min' (smaller is better) or mode='max'")
    if mode is not None:
        return "min" if mode == "min" else "max"
    found = better(monitor)
    if found is None:
        kind, slash, name = monitor.rpartition("/")
        near = difflib.get_close_matches(name, _COMMON, n=1, cutoff=0.75)
        meant = f". Did you mean {kind + slash + near[0]!r}?" if near else ""
        raise SettingError(
            f"whether {monitor!r} should fall or rise does not follow from its name; "
            f"add mode='min' (smaller is better) or mode='max'{meant}"
        )
    return found


def improved(value: float, best: float | None, direction: Direction, min_delta: float = 0.0) -> bool:
    """True if ``value`` beats ``best`` by more than ``min_delta``.

    NaN never does; anything else beats None and NaN.

    >>> improved(0.5, 0.6, "min"), improved(0.5, 0.6, "min", 0.2), improved(float("nan"), None, "max")
    (True, False, False)
    """
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value < best - min_delta if direction == "min" else value > best + min_delta
