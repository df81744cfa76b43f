"""Data as batches in a known order: adapters for what users have, our own loader, and what the loop asks of a batch."""

from loopwright.data.batch import move, samples
from loopwright.data.chunks import Chunks, chunked
from loopwright.data.download import fetch
from loopwright.data.fingerprint import changes, fingerprint
from loopwright.data.gather import Gather
from loopwright.data.iterated import Iterated
from loopwright.data.lengths import epoch_length, limit
from loopwright.data.loader import Loader
from loopwright.data.mix import Mix
from loopwright.data.module import DataModule, data_of, opened
from loopwright.data.plan import Blocks
from loopwright.data.samplers import BatchSampler, BucketSampler, WeightedSampler
from loopwright.data.schema import Schema, schema_of
from loopwright.data.share import Cut, shared
from loopwright.data.sources import as_source, as_sources
from loopwright.data.split import folds, train_valid_split
from loopwright.data.summary import summary
from loopwright.data.torch_loader import TorchLoader

__all__ = [
    "BatchSampler",
    "Blocks",
    "BucketSampler",
    "Chunks",
    "Cut",
    "DataModule",
    "Gather",
    "Iterated",
    "Loader",
    "Mix",
    "Schema",
    "TorchLoader",
    "WeightedSampler",
    "as_source",
    "as_sources",
    "changes",
    "chunked",
    "data_of",
    "epoch_length",
    "fetch",
    "fingerprint",
    "folds",
    "limit",
    "move",
    "opened",
    "samples",
    "schema_of",
    "shared",
    "summary",
    "train_valid_split",
]
