"""The warnings that come up during a fit, noted on their way to where they went before."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["Warned"]

_MOST = 100  # different ones


class Warned:
    """Stands in front of ``warnings.showwarning``, which Python lets anybody replace, between ``start`` and ``stop``.

    Fits may nest or run in threads: where somebody else stands in front of this one when it stops, it stays, and only
    passes on.

    >>> warned = Warned()
    >>> with warnings.catch_warnings(record=True):
    ...     warnings.simplefilter("always")
    ...     warned.start()
    ...     for _ in range(2):
    ...         warnings.warn_explicit("cold", UserWarning, "here.py", 1, registry={})
    ...     warned.stop()
    [{'kind': 'UserWarning', 'text': 'cold', 'times': 2}]
    """

    def __init__(self) -> None:
        self.met: dict[tuple[str, str], int] = {}
        self._before: Any = None
        self._front: Any = None

    def start(self) -> None:
        self.stop()
        self.met = {}
        before = warnings.showwarning
        met = self.met

        def note(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if self.met is met:
                key = (category.__name__, str(message)[:2000])
                if key in met or len(met) < _MOST:
                    met[key] = met.get(key, 0) + 1
            before(message, category, filename, lineno, file, line)

        self._before, self._front = before, note
        warnings.showwarning = note

    def stop(self) -> list[dict[str, Any]]:
        """What was met since ``start``."""
        if self._front is not None and warnings.showwarning is self._front:
            warnings.showwarning = self._before
        self._front = self._before = None
        met, self.met = self.met, {}
        return [{"kind": kind, "text": text, "times": times} for (kind, text), times in met.items()]
