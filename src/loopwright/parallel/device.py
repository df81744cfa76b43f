"""The device of a run."""

from __future__ import annotations

from typing import Any

import torch

from loopwright.errors import SettingError

__all__ = ["check_device", "pick_device"]


def check_device(device: Any) -> None:
    """Raise SettingError for what can name no device: torch takes a text, one of its own, or the number of one."""
    number = isinstance(device, int) and not isinstance(device, bool) and device >= 0
    if not number and not isinstance(device, (str, torch.device)):
        raise SettingError(f"device={device!r}: expected 'auto', or a device such as 'cpu' or 'cuda:0'")


def pick_device(device: str | torch.device) -> torch.device:
    """The torch device for ``"auto"`` (an accelerator if there is one, else the CPU), ``"cpu"``, ``"cuda:1"``, ...

    Raises SettingError for a device that does not exist here.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            return torch.device("cpu")
        return torch.device(found.type, torch.accelerator.current_device_index())
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError(f"device={device!r} is no torch device ({error}); use 'auto', 'cpu' or 'cuda:0'") from None
    if picked.type not in ("cpu", "meta"):
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if here is not None else 0
        if here is None or here.type != picked.type or (picked.index or 0) >= count:
            there = f"{count} of type {here.type!r}" if here is not None else "none"
            raise SettingError(
                f"device={str(device)!r} is not on this machine (accelerators: {there}); use device='auto'"
            )
    return picked
