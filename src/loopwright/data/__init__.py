"""Data as batches in a known order: adapters for what users have, our own loader, and what the loop asks of a batch."""

from loopwright.data.batch import move, samples
from loopwright.data.gather import Gather
from loopwright.data.iterated import Iterated
from loopwright.data.loader import Loader
from loopwright.data.module import DataModule, data_of, opened
from loopwright.data.sources import as_source, as_sources
from loopwright.data.torch_loader import TorchLoader

__all__ = [
    "DataModule",
    "Gather",
    "Iterated",
    "Loader",
    "TorchLoader",
    "as_source",
    "as_sources",
    "data_of",
    "move",
    "opened",
    "samples",
]
