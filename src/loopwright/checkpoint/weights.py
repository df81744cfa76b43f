"""Weights from a checkpoint into a module, all of them or those that fit, with a report of what came of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loopwright.checkpoint.fit import differs, some
from loopwright.checkpoint.shelf import find
from loopwright.checkpoint.store import read
from loopwright.data.trained_on import TrainedOn
from loopwright.errors import CheckpointError, choose
from loopwright.events import describe
from loopwright.optim import match_names

__all__ = ["Loaded", "load_weights"]


@dataclass(slots=True)
class Loaded:
    """What ``load_weights`` has done; names are those of the module. ``print`` it.

    ``loaded``: now as in the checkpoint. ``missing``: not in the checkpoint. ``unexpected``: in the checkpoint only.
    ``reshaped``: in both, with another shape; the texts say which.
    """

    source: Path
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wanted = len(self.loaded) + len(self.missing) + len(self.reshaped)
        lines = [f"{self.source}: {len(self.loaded)} of {wanted} tensors fit"]
        for what, names in (
            ("missing there", self.missing), ("unexpected", self.unexpected), ("of another shape", self.reshaped),
        ):  # fmt: skip
            lines += [f"  {what}: {some(names)}"] if names else []
        return "\n".join(lines)


def load_weights(
    module: nn.Module,
    path: Path | str,
    *,
    model: str | None = None,
    only: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
) -> Loaded:
    """Load weights and buffers into ``module`` from a checkpoint, the newest one of a run, or a ``.safetensors`` file.

    ``module`` may be a task: then it is the module that the task names "model", as its checkpoints do. ``model``: which
    one, of a checkpoint that holds several. ``only``: shell-style patterns (``"encoder.*"``) of the names in ``module``
    that are wanted; the rest is not touched. ``rename``: new beginnings of the names in the checkpoint (``{"backbone.":
    "encoder."}``), or a function of the name. Values take the dtype and device of ``module``. Nothing in the file is
    executed.

    A ``module`` that is loaded whole from a checkpoint also remembers of what the data of its training was made:
    ``predict``, ``validate`` and ``test`` raise DataError for other columns, dtypes or parts, as where it was trained.
    A fit forgets it, and leaves what it has trained on.

    Raises CheckpointError, with the report, and loads nothing, if something that is wanted is missing or has another
    shape; with ``strict=False`` what fits is loaded, and it is an error only if nothing does.

    >>> import torch
    >>> from loopwright.checkpoint import write
    >>> there = write(Path("checkpoints/step-00000001"), {"model": {"body.weight": torch.ones(2, 3)}}, {}, {})
    >>> net = nn.ModuleDict({"encoder": nn.Linear(3, 2, bias=False), "head": nn.Linear(2, 1)})
    >>> print(load_weights(net, there, only="encoder.*", rename={"body.": "encoder."}))
    checkpoints/step-00000001: 1 of 1 tensors fit
    """
    path, module = Path(path), _module_of(module, model or "model")
    source, saved, trained_on = _read(path, model)
    named = {_renamed(name, rename): value for name, value in saved.items()}
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    wanted = own.keys() if only is None else match_names(only, own)
    report = Loaded(source)
    fitting: dict[str, Tensor] = {}
    for name in (name for name in own if name in wanted):
        if name not in named:
            report.missing.append(name)
        elif differs(own[name], named[name], dtype=False):
            report.reshaped.append(f"{name} is {describe(named[name])} there and {describe(own[name].cpu())} here")
        else:
            fitting[name] = named[name]
            report.loaded.append(name)
    report.unexpected = [] if only is not None else [name for name in named if name not in own]
    if not fitting or (strict and (report.missing or report.reshaped or report.unexpected)):
        ways = ["only='encoder.*' names what is wanted", "strict=False takes what fits"] if fitting else []
        if report.missing and (unused := named.keys() - own.keys()):
            old, new = _beginnings(min(unused), min(report.missing))
            ways.append(f"rename={{{old!r}: {new!r}}} gives names other beginnings")
        raise CheckpointError(f"nothing was loaded. {report}\nWhat may help: {', '.join(ways) or 'another checkpoint'}")
    module.load_state_dict({**module.state_dict(), **fitting})
    if len(fitting) == len(own) and trained_on is not None:
        trained_on.remember(module)
    return report


def _read(path: Path, model: str | None) -> tuple[Path, dict[str, Tensor], TrainedOn | None]:
    if path.suffix == ".safetensors":
        try:
            return path, load_file(path), None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    found = find(path)
    data = read(found)
    files = data.files
    group = f"model.{model}" if model is not None else "model"
    if group not in files:
        known = [name.removeprefix("model.") for name in files]
        raise CheckpointError(f"{found} holds several models, and model={model!r} is none. {choose(model, known)}")
    whole = group in ("model", "model.model") and "data" in data.state  # one of several has a part of the batch
    return found, files[group], TrainedOn.from_dict(data.state["data"]) if whole else None


def _renamed(name: str, rename: Mapping[str, str] | Callable[[str], str] | None) -> str:
    if callable(rename):
        return rename(name)
    for old, new in (rename or {}).items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _beginnings(there: str, here: str) -> tuple[str, str]:
    """What to replace at the beginning of a name, and by what: at least one part is another, or is one more.

    >>> _beginnings("0.weight", "module.0.weight"), _beginnings("net.0.weight", "0.weight"), _beginnings("a.w", "b.w")
    (('', 'module.'), ('net.', ''), ('a.', 'b.'))
    """
    if here.endswith(f".{there}"):
        return "", here.removesuffix(there)
    if there.endswith(f".{here}"):
        return there.removesuffix(here), ""
    return there.partition(".")[0] + ".", here.partition(".")[0] + "."


def _module_of(given: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` of a task; any other module as it is."""
    method = getattr(type(given), "models", None)
    models = method(given) if isinstance(method, FunctionType) else None
    found = models.get(name) if isinstance(models, Mapping) else None
    return found if isinstance(found, nn.Module) else given
