from __future__ import annotations

import io
import re

import pytest


class Terminal(io.StringIO):
    """A terminal that scrolls, understands what a display may send, and refuses anything else."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, width: int = 100, height: int = 6) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.lines: list[list[str]] = [[]]
        self.row = self.column = self.top = 0  # top: the first line that is still on the screen
        self.saved, self.drawing = (0, 0), False
        self.refreshes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.refreshes += 1
        for token in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b.|[\r\n]|[^\x1b\r\n]", text):
            self._take(token)
        return super().write(text)

    def _take(self, token: str) -> None:
        if token == "\r":
            self.column = 0
        elif token in ("\n", "\x1bD"):
            self.row, self.column = self.row + 1, 0 if token == "\n" else self.column
            self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]
            self.top = max(self.top, self.row + 1 - self.height)
        elif token == "\x1b7":
            self.saved, self.drawing = (self.row - self.top, self.column), True  # a place on the screen
        elif token == "\x1b8":
            self.row, self.column, self.drawing = self.top + self.saved[0], self.saved[1], False
        elif token == "\x1b[J":
            del self.lines[self.row + 1 :]
            del self.lines[self.row][self.column :]
        elif token.endswith("A") and token.startswith("\x1b["):
            self.row = max(self.top, self.row - int(token[2:-1]))
        elif token.endswith("m") and token.startswith("\x1b["):
            pass
        else:
            assert not token.startswith("\x1b"), f"unexpected escape {token!r}"
            line = self.lines[self.row]
            line += [" "] * (self.column + 1 - len(line))
            line[self.column] = token
            self.column += 1
            fits = self.column < self.width or not self.drawing
            assert fits, f"a bar reaches the right edge, where it would wrap: {''.join(line)!r}"

    @property
    def screen(self) -> list[str]:
        """What is to be read, also above the top, without empty lines at the end."""
        lines = ["".join(line).rstrip() for line in self.lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "LOOPWRIGHT_PROGRESS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()
