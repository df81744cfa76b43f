"""Where a run lives: its processes, its device, its precision. One process here."""

from loopwright.parallel.comm import Single
from loopwright.parallel.device import pick_device
from loopwright.parallel.precision import Autocast, Plain, Scaled, pick_precision

__all__ = ["Autocast", "Plain", "Scaled", "Single", "pick_device", "pick_precision"]
