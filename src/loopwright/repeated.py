"""Whether this very run has been done before: what tells a run from others, kept with each that has finished."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.data import fingerprint
from loopwright.data.fingerprint import innermost
from loopwright.described import plain
from loopwright.folder import packages, read_record
from loopwright.parallel import local
from loopwright.provenance import code_digest
from loopwright.state import Run
from loopwright.written import warn

__all__ = ["identity", "note_finished", "same_as_before", "say_if_repeated"]

_WRITES_ONLY = {"folder", "name", "progress", "loggers"}  # where a run is written and shown, which changes no result
_LIST = ".finished"  # in the folder of all runs: a line for each that has finished, 70 bytes
_HEAD = 32  # elements of each tensor that tell where training starts


def identity(run: Run, settings: Mapping[str, Any], data: Any, *, seed: int | None) -> dict[str, str] | None:
    """Hashes of what the result of ``run`` follows from, before its first step: of its ``settings`` and the command
    line, its ``code``, its ``data`` and where it will ``start`` (weights, and the generators where nothing seeds them).

    None where the code is not known: in a notebook, at a prompt. It takes about a millisecond and reads no sample.
    """
    code = code_digest()
    if code is None:
        return None
    told = {name: value for name, value in settings.items() if name not in _WRITES_ONLY}
    where = [sys.argv[1:], str(run.device), run.comm.world_size]
    sources = {id(innermost(s)): s for stage in run.stages for s in (*stage.valid.values(), stage.source)}
    sources.pop(id(innermost(run.data)), None)  # of this ``data`` tells; how it is read is among the settings
    generators = [] if seed is not None else [torch.get_rng_state().numpy().tobytes()]
    return {
        "settings": _hash(_text([told, where])), "code": _hash(_text([code, packages()])),
        "data": _hash(_text([data, [fingerprint(s) for s in sources.values()]])),
        "start": _hash(*_heads(run), *generators),
    }  # fmt: skip


def say_if_repeated(root: Path | str, name: str, who: Mapping[str, str] | None) -> None:
    """Warn if a run with the identity ``who`` has finished in ``root``; two files are opened, however many runs it has.

    A run of another ``name`` is the same one, and it is said that it had that.
    To be told nothing: ``warnings.filterwarnings("ignore", "this very run")``.
    """
    earlier = None if who is None else _finished(Path(root), who)
    if earlier is None:
        return
    folder, record = earlier
    other = folder.parent.name
    named = f" under another name, {other!r}" if other != name else ""
    ended = f" on {record['ended'][:16].replace('T', ' ')}" if isinstance(record.get("ended"), str) else ""
    shown = ", ".join(_shown(record.get("metrics")))
    result = f" with {shown}" if shown else ""
    warn(
        f"this very run was done before{named}: {folder} finished{ended}{result}. Settings, code, "
        "seed and starting weights are the same, and the data as far as its fingerprint tells. See it by "
        f"`loopwright report {folder}`; to repeat runs without being told: "
        "warnings.filterwarnings('ignore', 'this very run')"
    )


def same_as_before(folder: Path, who: Mapping[str, str] | None, *, resumed: bool) -> dict[str, str] | None:
    """The identity of a run that goes on in ``folder``: the one that it began with; None if it is not that any more."""
    before = read_record(folder).get("identity")
    if not resumed or who is None or not isinstance(before, dict):
        return None
    return before if {**before, "start": ""} == {**who, "start": ""} else None


def note_finished(folder: Path) -> None:
    """Let later runs in the same place find the one in ``folder``, which has come to its end."""
    who = read_record(folder).get("identity")
    if isinstance(who, dict):
        # a run that has ended well does not fail because of this
        with suppress(OSError), (folder.parent.parent / _LIST).open("a", encoding="utf-8") as file:
            file.write(f"{_hash(_text(who))} {folder.parent.name}/{folder.name}\n")


def _finished(root: Path, who: Mapping[str, str]) -> tuple[Path, dict[str, Any]] | None:
    """The run of that identity that has finished last, and its record."""
    try:
        lines = (root / _LIST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.findall(rf"^{_hash(_text(dict(who)))} ([^/\\\n]+/[^/\\\n]+)$", lines, re.MULTILINE)
    if not found or ".." in found[-1].split("/"):
        return None
    folder = root / found[-1]
    record = read_record(folder)
    same = record.get("identity") == dict(who) and record.get("status") in ("done", "stopped")
    return (folder, record) if same else None  # it may be gone, or have gone on with other settings


def _shown(metrics: Any) -> Iterator[str]:
    """The last values of a run, those of the validation where there was one."""
    found = {k: v for k, v in metrics.items() if isinstance(v, (int, float))} if isinstance(metrics, dict) else {}
    names = [name for name in found if name.startswith("valid/")] or list(found)
    yield from (f"{name[:60]} {found[name]:.4g}" for name in names[:4] if name.isprintable())


def _heads(run: Run) -> Iterator[bytes]:
    """The first elements of every weight, read from each device in one go: other weights differ there."""
    modules = [*run.models.values(), *(one for one in run.state.values() if isinstance(one, nn.Module))]
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in (local(p) for module in modules for p in module.parameters()):
        if tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta) and tensor.numel():
            row = tensor.detach()[(0,) * (tensor.dim() - 1)].reshape(-1)[:_HEAD]
            by_device.setdefault(tensor.device, []).append(row.resolve_conj().contiguous().view(torch.uint8))
    for rows in by_device.values():
        yield torch.cat(rows).cpu().numpy().tobytes()


def _text(value: Any) -> bytes:
    return json.dumps(plain(value), sort_keys=True).encode()


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
