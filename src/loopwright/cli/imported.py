"""``loopwright import-legacy``."""

from __future__ import annotations

from pathlib import Path

from loopwright.checkpoint import read
from loopwright.cli.tables import format_size, safe
from loopwright.legacy import import_legacy

__all__ = ["print_imported"]


def print_imported(source: Path, dest: str, *, key: str | None, prefix: str) -> int:
    """Import, and say what came over, what did not, and how to use it."""
    data = read(import_legacy(source, dest, key=key, prefix=prefix))
    info, tensors = data.info, data.files["model"]
    size = format_size(sum(t.numel() * t.element_size() for t in tensors.values()))
    place = f" from {info['weights_at']!r}" if info["weights_at"] else ""
    print(safe(f"{dest}: {len(tensors)} tensor{'s' * (len(tensors) != 1)}{place}, {size}"))
    counts = [f"{name} {info[name]}" for name in ("epoch", "step") if info[name] is not None]
    number = len(info["settings"])
    counts += [f"{number} setting{'s' * (number != 1)}"] if number else []
    if counts:
        print(safe(f"also kept: {', '.join(counts)}"))
    if info["left_out"]:
        print(safe(f"left out: {', '.join(info['left_out'])}"))
    if info["without_prefix"]:
        print(safe(f"left out: names that do not begin with {prefix!r} ({info['without_prefix']})"))
    begins = {name.partition(".")[0] for name in tensors}
    if not prefix and len(begins) == 1 and all("." in name for name in tensors):
        print(safe(f"all names begin with '{(begin := begins.pop())}.'; to take it off: --prefix {begin}."))
    print(safe(f"To use it: model.load_state_dict(loopwright.checkpoint.read({dest!r}).files['model'])"))
    return 0
