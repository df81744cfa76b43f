"""Weights that another program saved, as a checkpoint of ours: state dicts, checkpoints of Lightning, safetensors.

Such files are pickles, as a rule, and a pickle may ask for any function to be called. It is read in a process of its
own, by ``torch.load(weights_only=True)``, which builds tensors and plain data and refuses all else, under limits of
memory and time. That process writes a checkpoint; this one reads it as it reads every other.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loopwright import __version__
from loopwright.checkpoint import encode, read, write
from loopwright.checkpoint.places import Place, as_place
from loopwright.errors import CheckpointError, choose
from loopwright.text import with_article

__all__ = ["import_legacy"]

_RATIO = 100  # bytes that one byte of a file may unpack to
_GIB = 1 << 30
_PLACES = ("state_dict", "model_state_dict", "model", "module")  # where programs keep weights, the most telling first
_SETTINGS = ("hyper_parameters", "hparams", "config", "args")


def import_legacy(source: Path | str, dest: Place | str, *, key: str | None = None, prefix: str = "") -> Place:
    """Write the weights in ``source`` as the checkpoint ``dest``, and return its path.

    ``source``: what ``torch.save`` wrote (a state dict, or a dict with one in it, such as a ``.ckpt`` of Lightning),
    or safetensors. ``key``: where in it the weights are, ``"a.b"`` for what is nested; without it a usual place, or
    the only one, is taken. ``prefix``: only names that begin with it are kept, without it: ``"model."`` for a
    LightningModule that holds the plain module as ``self.model``. The tensors are then
    ``checkpoint.read(dest).files["model"]``; epoch, step and plain hyper-parameters are in ``.info``.

    Nothing in ``source`` is executed. Raises CheckpointError if it holds code or anything else that is no tensor or
    plain data, if the weights are not found, if it needs too much memory or time, and if ``dest`` exists.

    >>> import torch
    >>> torch.save({"state_dict": {"model.w": torch.ones(2)}, "epoch": 3}, "theirs.ckpt")  # doctest: +SKIP
    >>> path = import_legacy("theirs.ckpt", "ours", prefix="model.")  # doctest: +SKIP
    >>> read(path).files["model"], read(path).info["epoch"]  # doctest: +SKIP
    ({'w': tensor([1., 1.])}, 3)
    """
    source, dest = Path(source), as_place(dest)
    if not source.is_file():
        raise CheckpointError(f"{source} is not a file" if source.exists() else f"{source} does not exist")
    if dest.exists():
        raise CheckpointError(f"{dest} exists; nothing was written. Name a folder that does not exist yet")
    with tempfile.TemporaryDirectory(prefix="loopwright-import-") as folder:
        made = Path(folder, "checkpoint")
        _convert_apart(source, made, key=key, prefix=prefix)
        data = read(made)
    return write(dest, data.files, data.state, data.info)


def _convert_apart(source: Path, made: Path, *, key: str | None, prefix: str) -> None:
    """Run ``_convert`` in a process of its own, which answers with one line of JSON."""
    size = source.stat().st_size
    order = {"source": str(source), "made": str(made), "key": key, "prefix": prefix}
    command = [sys.executable, "-P", "-m", "loopwright.legacy", json.dumps(order)]  # -P: nothing from this folder
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=600 + size / 1e6, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{source} was not read within {600 + size / 1e6:.0f} s; it was given up") from None
    if done.returncode == 0:
        return
    try:
        answer = json.loads(done.stdout.splitlines()[-1])["error"]
    except (LookupError, ValueError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        answer = f"{source} could not be read: the process that read it ended with {done.returncode} ({last[0]})"
    raise CheckpointError(str(answer))


# ----------------------------------------------------------------- what follows runs in the process of its own


def _main(order: dict[str, Any]) -> int:
    source = Path(order["source"])
    try:
        _limit(_unpacked(source))
        _convert(source, Path(order["made"]), key=order["key"], prefix=order["prefix"])
    except (MemoryError, RuntimeError) as error:  # torch says "can't allocate memory" in a RuntimeError
        text = str(error) if isinstance(error, CheckpointError) else f"{source} cannot be read: {_first_line(error)}"
        if isinstance(error, MemoryError) or "allocate" in text:
            text = f"{source} asks for more memory than a file of its size can need; refused"
        print(json.dumps({"error": text}))
        return 1
    return 0


def _unpacked(source: Path) -> int:
    """The bytes that the file holds, unpacked. Raises CheckpointError for more than it can mean honestly."""
    size = total = source.stat().st_size
    if zipfile.is_zipfile(source):
        with suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(source) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    if total > _RATIO * size:
        raise CheckpointError(
            f"{source} has {size:,} bytes and would unpack to {total:,}, more than {_RATIO} times as many; refused"
        )
    return total


def _limit(total: int) -> None:
    """Let this process have what a file of that size needs, and no more: memory, time, files."""
    try:
        import resource
    except ImportError:  # Windows; the time is limited from outside there
        return
    import torch

    torch.set_num_threads(1)
    own = 4 * _GIB  # torch with CUDA reserves gigabytes of addresses
    with suppress(OSError):
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        "RLIMIT_AS": own + 4 * total + _GIB, "RLIMIT_CPU": 60 + total // 10**7, "RLIMIT_FSIZE": 2 * total + _GIB,
        "RLIMIT_CORE": 0,
    }  # fmt: skip
    for name, value in limits.items():
        with suppress(AttributeError, OSError, ValueError):  # not every system has each
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (most, most))


def _convert(source: Path, made: Path, *, key: str | None, prefix: str) -> None:
    """Read ``source`` and write it as a checkpoint."""
    import torch

    content = _load(source)
    place, weights = _weights(content, key, source)
    named = {str(name): value for name, value in weights.items() if str(name).startswith(prefix)}
    if not named:
        begins = {f"{str(name).partition('.')[0]}." for name in weights}
        raise CheckpointError(f"no name in {source} begins with --prefix {prefix!r}. {choose(prefix, begins)}")
    named = {name.removeprefix(prefix): value for name, value in named.items()}
    tensors = {name: value for name, value in named.items() if _is_dense(value)}
    extras = {name: value for name, value in named.items() if name not in tensors}
    others: Mapping[Any, Any] = content if place and isinstance(content, Mapping) else {}
    kept = {name: others.get(name) for name in ("epoch", "global_step", "step") if type(others.get(name)) is int}
    at, settings = next(((n, others[n]) for n in _SETTINGS if n in others and _is_plain(others[n])), ("", {}))
    info = {
        "step": kept.get("global_step", kept.get("step")), "epoch": kept.get("epoch"), "settings": settings,
        "imported_from": source.name, "weights_at": place or None, "without_prefix": len(weights) - len(named),
        "left_out": sorted(str(name) for name in others if name not in (place.partition(".")[0], at, *kept)),
        "exact": [f"it was imported from {source.name}, and holds weights only"],
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"loopwright": __version__, "torch": str(torch.__version__)},
    }  # fmt: skip
    write(made, {"model": tensors}, {"models": {"model": extras} if extras else {}}, info)


def _load(source: Path) -> Any:
    """What a file holds: tensors and plain data, and nothing else whatever it asks for."""
    import torch

    with open(source, "rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # the length of a header in JSON, and its begin
            return _load_safetensors(source)
        return torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251 - in a process of its own
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            raise MemoryError(_first_line(error)) from None
        raise CheckpointError(_refusal(source, error)) from None


def _load_safetensors(source: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(source, framework="pt") as data:
        tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118 - it is no mapping
        aliases = data.metadata() or {}  # where safetensors.torch.save_model keeps tied weights
    return tensors | {name: tensors[kept] for name, kept in aliases.items() if kept in tensors}


_MEND = "save the weights alone with the program that wrote it: torch.save(model.state_dict(), 'weights.pt')"


def _refusal(source: Path, error: Exception) -> str:
    """What is wrong, in words of ours: those of torch advise to switch its safety off."""
    text = str(error)
    if "TorchScript" in text:
        return f"{source} is a TorchScript archive, or looks like one. It may hold code, so it was not read; {_MEND}"
    named = re.search(r"(?:GLOBAL|class|function|load|find class) ([\w.]+\.\w+)", text)
    if text.startswith("Weights only load failed") and named:
        return (
            f"{source} asks for {named[1]}, which is neither a tensor nor plain data. It may be code, so it was not "
            f"read, and nothing was executed. If you trust the file, {_MEND}"
        )
    why = _first_line(text.rpartition("WeightsUnpickler error:")[2].strip())
    why = "" if re.search(r"torch\.load|weights_only|safe_globals", why) else f": {why}"
    told = f"{type(error).__name__}{why}"
    if "legacy .tar" in text:  # empty ones are so many zeros
        told = "it reads as a .tar file, as torch wrote them before 0.1.10; they may hold code, and are not opened"
    return f"{source} is not what torch.save or safetensors writes, or it is damaged ({told})"


def _first_line(error: BaseException | str) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _weights(content: Any, key: str | None, source: Path) -> tuple[str, Mapping[Any, Any]]:
    """Where the weights are in what a file holds ("" for all of it), and the weights."""
    if key is not None:
        return key, _at(content, key, source)
    if _is_weights(content):
        return "", content
    found = [name for name, value in content.items() if _is_weights(value)] if isinstance(content, Mapping) else []
    place = next((name for name in _PLACES if name in found), found[0] if len(found) == 1 else None)
    if place is None:
        holds = f"a dict of {', '.join(map(repr, content))}" if isinstance(content, Mapping) else type(content).__name__
        several = f"weights in several places: {', '.join(map(repr, found))}" if found else f"no weights, but {holds}"
        raise CheckpointError(f"{source} holds {several}. Say where they are: --key NAME, or NAME.NAME")
    return str(place), content[place]


def _at(content: Any, key: str, source: Path) -> Mapping[Any, Any]:
    value, rest = content, key
    while rest:
        known = value if isinstance(value, Mapping) else {}
        name = next((n for n in sorted(map(str, known), key=len, reverse=True) if f"{rest}.".startswith(f"{n}.")), None)
        if name is None:
            raise CheckpointError(f"{source} has no {key!r}. {choose(rest, known)}")
        value, rest = known[name], rest[len(name) + 1 :]
    if not _is_weights(value):
        raise CheckpointError(
            f"{key!r} in {source} is {with_article(type(value).__name__)}, and not a dict of tensors by name"
        )
    return value  # type: ignore[no-any-return]


def _is_weights(value: Any) -> bool:
    """True for tensors by name; a module's extra state may be among them."""
    from torch import Tensor

    named = value if isinstance(value, Mapping) else {}
    return any(isinstance(v, Tensor) for v in named.values()) and all(
        isinstance(n, str) and (isinstance(v, Tensor) or n.endswith("_extra_state")) for n, v in named.items()
    )


def _is_dense(value: Any) -> bool:
    import torch
    from torch import Tensor, nn

    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return plain and not (value.is_quantized or value.is_meta or value.is_nested)


def _is_plain(value: Any) -> bool:
    with suppress(CheckpointError):
        return isinstance(value, Mapping) and not encode(dict(value))[1]
    return False


if __name__ == "__main__":
    raise SystemExit(_main(json.loads(sys.argv[1])))
