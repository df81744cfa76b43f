"""Steps compiled by torch: forward and loss as one function, never the user's module, whose names stay as they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from loopwright._compat import graphs_compiled, has_cpp_compiler
from loopwright.errors import SettingError, choose
from loopwright.state import Step

__all__ = ["Compiler", "compile_options"]

_OPTIONS = ("backend", "dynamic", "fullgraph", "mode", "options")  # of torch.compile
_REUSES_MEMORY = ("reduce-overhead", "max-autotune")


def compile_options(compile: Any) -> dict[str, Any] | None:
    """What ``Trainer(compile=...)`` hands to ``torch.compile``; None for False.

    Each size of batch has a graph of its own, unless ``{"dynamic": True}`` asks for one for all. Torch's own rule, one
    for the first size and a slower one for all others, is not taken: after a short last batch the slower one is used
    for ever, and what is computed would depend on the sizes that this process has seen before. Raises SettingError for
    what is no option of ``torch.compile``.

    >>> compile_options({"mode": "max-autotune-no-cudagraphs"})
    {'dynamic': False, 'mode': 'max-autotune-no-cudagraphs'}
    """
    if compile is False:
        return None
    if compile is not True and not isinstance(compile, Mapping):
        raise SettingError(
            f"compile={compile!r}: expected True, False or a dict of options of torch.compile, such as "
            'compile={"fullgraph": True}'
        )
    given = {} if compile is True else dict(compile)
    unknown = next((name for name in given if name not in _OPTIONS), None)
    if unknown is not None:
        raise SettingError(f"compile={{{unknown!r}: ...}} is no option of torch.compile. {choose(unknown, _OPTIONS)}")
    return {"dynamic": False, **given}


class Compiler:
    """Compiles the steps of a run, each when it is first called; those of a task are kept for its next run."""

    def __init__(self, options: Mapping[str, Any], device: torch.device) -> None:
        self.options = dict(options)
        if device.type == "cpu" and not {"backend", "mode", "options"} & self.options.keys():
            # dropout draws as eager code does; numbers made by generated code cost more there than they save
            self.options["options"] = {"fallback_random": True}
        self.name = ", ".join(f"{name}={_said(value)}" for name, value in sorted(self.options.items()))
        self._before, self._after = graphs_compiled(), -1

    @property
    def graphs(self) -> int:
        """Graphs that this process has compiled from when the run was prepared to its end."""
        return (graphs_compiled() if self._after < 0 else self._after) - self._before

    def close(self) -> None:
        """The run has ended: what is compiled from now on is not its own."""
        self._after = graphs_compiled()

    def __call__(self, step: Step) -> Step:
        """``step``, compiled."""
        owner = getattr(step, "__self__", None)
        if not isinstance(owner, nn.Module):
            return self._compiled(step)
        kept: dict[Any, Step] = owner.__dict__.setdefault("_compiled", {})
        key = (step.__func__, self.name)  # type: ignore[attr-defined]
        if key not in kept:
            kept[key] = self._compiled(step)
        return kept[key]

    def _compiled(self, step: Step) -> Step:
        def call(batch: Any) -> Any:
            return step(batch)

        # torch keeps at most 8 graphs with a code object, and then goes on uncompiled: each step has one of its own
        call.__code__ = call.__code__.replace()
        compiled: Step = torch.compile(wraps(step)(call), **self.options)
        return compiled

    def problem(self, device: torch.device) -> str | None:
        """Why nothing can be compiled here; None where it can."""
        if self.options.get("backend", "inductor") != "inductor":
            return None
        if device.type == "cpu" and not has_cpp_compiler():
            return (
                "compile=True needs a C++ compiler, and none was found ($CXX, clang++, g++). Install one, such as: "
                "apt install g++; or leave compile out"
            )
        if device.type == "cuda":
            if find_spec("triton") is None:
                return "compile=True needs triton on CUDA: pip install triton; or leave compile out"
            if not any(map(shutil.which, ("cc", "gcc", "clang"))):
                return (
                    "compile=True needs a C compiler on CUDA, and none was found (cc, gcc, clang). Install one, such "
                    "as: apt install gcc; or leave compile out"
                )
            if self.options.get("mode") in _REUSES_MEMORY:
                return (
                    f"compile={{'mode': {self.options['mode']!r}}} gives each step's output the memory of the one "
                    "before, which records and metrics still read; write 'max-autotune-no-cudagraphs'"
                )
        return None


def _said(value: Any) -> str:
    return getattr(value, "__qualname__", "") or repr(value)
