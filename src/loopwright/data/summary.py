"""One sample's way through dataset, transforms and batch, told in words; and why it ends where it does."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from loopwright import rng
from loopwright.data.arrays import as_tensors, is_array, pick, shared_length
from loopwright.data.diagnosis import diagnose
from loopwright.data.fetching import fetch_samples
from loopwright.data.generators import Streams, kept
from loopwright.data.loader import Loader
from loopwright.data.sources import as_source
from loopwright.data.words import count, is_like_a_sample, parts_of
from loopwright.errors import LoopwrightError
from loopwright.text import with_article

__all__ = ["Step", "Summary", "summary"]

_ROLES = ("transform", "target_transform", "transforms")  # where datasets keep what they apply to a sample
_BATCH = 64
_NONE = object()
_OF_SAMPLES = (
    "a list is one of ready batches, and the first looks like a single sample: of a list of samples make a dataset, "
    "torch.utils.data.Subset(samples, range(len(samples)))"
)


@dataclass(slots=True)
class Step:
    """One station of the way. ``parts``: what is there by its path, in words, as ``{"[0]": "float32 (3, 8, 8)"}``."""

    title: str
    parts: dict[str, str] = field(default_factory=dict)
    value: Any = field(default=None, repr=False)


@dataclass(slots=True)
class Summary:
    """What ``summary`` found; ``print`` it. ``problem`` is None where all went well, ``fix`` also where it tells."""

    name: str
    steps: list[Step] = field(default_factory=list)
    samples: int | None = None
    batches: int | None = None
    batch_size: int | None = None
    workers: int = 0
    exact: list[str] = field(default_factory=list)  # reasons why a resume would not be
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        width = max((len(path) for step in self.steps for path in step.parts), default=0)
        lines = [self.name, ""]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number:>2}. {step.title}")
            lines += [f"      {path:<{width}}  {words}".rstrip() for path, words in step.parts.items()]
        lines += [""] * bool(self.notes) + [f"note: {note}" for note in self.notes]
        lines += ["", *self._end()]
        return "\n".join(lines)

    __repr__ = __str__

    def _end(self) -> list[str]:
        if self.problem:
            return [f"PROBLEM: {self.problem}", *([f"TO MEND IT: {self.fix}"] if self.fix else [])]
        odd = f"; {count(len(self.notes), 'note')} above" if self.notes else ""
        return [f"No error found{odd}." if odd else "No problem found."]


def summary(data: Any) -> Summary:
    """The way of one sample of ``data`` through its dataset, every transform and the batch, in words.

    ``data`` is anything that ``fit`` takes. Told are types, shapes, dtypes and ranges at each step, then how many
    samples and batches there are, who reads them, and whether a run could resume exactly. Where a step fails, it is
    said why and how to mend it: which samples do not fit together, which transform raised. A ``Compose`` (anything
    with a list ``transforms``) is walked step by step. Random generators are left as they were, no worker is
    started, and an iterator, which can be read only once, is not read. Raises DataError for what is no data.

    >>> print(summary(Loader((torch.arange(12.0).view(6, 2), torch.arange(6)), batch_size=4)))
    Loader of a tuple of arrays
    <BLANKLINE>
     1. arrays with 6 samples; sample 0 is
          [0]  float32 (2), 0 to 1
          [1]  int64, 0
     2. batch: samples 0 to 3
          [0]  float32 (4, 2), 0 to 7
          [1]  int64 (4), 0 to 3
     3. epoch: 6 samples in 2 batches of at most 4, in order, read in the training process; resumes exactly
    <BLANKLINE>
    No problem found.
    """
    told = Summary(_name(data))
    with rng.forked(), kept(Streams({"data": data}).find().values()), torch.no_grad():
        walk = _Walk(told)
        try:
            walk.go(data)
            if told.problem is None:
                _tell_epoch(told, data)
        except _Stopped:
            pass
    told.notes += _notes(told)
    return told


class _Stopped(Exception):  # noqa: N818 - steers this file only
    """The problem has been told."""


class _Walk:
    def __init__(self, told: Summary) -> None:
        self.told, self.collates = told, "collate_fn"

    def go(self, data: Any) -> None:
        if type(data).__module__.startswith("loopwright.") and not isinstance(data, Loader):
            for held in ("data", "loader"):  # what reads other data: the way is that of the other data
                if hasattr(data, held):
                    return self.go(getattr(data, held))
            for name, one in getattr(data, "sources", {}).items():
                self.told.steps.append(Step(f"source {name!r}: {_name(one)}"))
                self.go(one)
            return None
        if isinstance(data, DataLoader):
            return self._loader(data)
        if isinstance(data, Loader):
            return self._own(data)
        if isinstance(data, IterableDataset):
            return self._loader(DataLoader(data, _BATCH))
        if isinstance(data, list):
            self._ready(iter(data), f"a list of {count(len(data), 'ready batch')}; batch 0 is")
            if is_like_a_sample(data[0]):
                self.told.notes.append(_OF_SAMPLES)
            return None
        counted = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, range)
        if is_array(data) or counted:
            return self._own(Loader(data, _BATCH))
        if callable(data):
            return self._ready(iter(data()), "a function that gives ready batches; batch 0 is")
        if isinstance(data, Iterator):
            self.told.steps.append(Step("an iterator: it can be read only once, and was not read"))
            return None
        if not isinstance(data, Iterable):
            as_source(data, train=False, key=0)  # says what is expected
        return self._ready(iter(data), f"{_name(data)} gives ready batches; batch 0 is")

    def _ready(self, batches: Iterator[Any], title: str) -> None:
        first = next(batches, _NONE)
        if hasattr(batches, "close"):
            batches.close()
        if first is _NONE:
            self.told.steps.append(Step(title.partition(";")[0].removesuffix(" is")))
            self._stop(
                "there is not one batch in it", "check the path, the filter or the split that the data comes from"
            )
        self._tell(title, first)

    def _own(self, loader: Loader) -> None:
        self.collates = "collate"  # as it is called there
        size = loader.batch_size or _BATCH
        transform, collate = getattr(loader, "transform", None), getattr(loader, "collate", None)
        if is_array(loader.data):
            tensors = as_tensors(loader.data)
            n = shared_length(tensors)
            first = pick(tensors, torch.arange(min(size, n)))
            self._tell(f"arrays with {count(n, 'sample')}; sample 0 is", _sample(first))
            if transform is None and collate is None:
                self._tell(_batch_title(min(size, n)), first)
            else:
                self._samples([_sample(first, i) for i in range(min(size, n))], transform, collate)
            return
        self._dataset(loader.data, range(min(size, len(loader.data))), transform, collate)

    def _loader(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset):
            stream = iter(copy.copy(loader.dataset))
            found = list(itertools.islice(stream, loader.batch_size or 1))
            self._tell(f"{_name(loader.dataset)}, a stream; its first sample is", found[0] if found else None)
            self._samples(found, None, loader.collate_fn, single=loader.batch_size is None)
            return
        sampler: Any = copy.copy(loader.batch_sampler or loader.sampler)
        indices: Any = next(iter(sampler), []) if loader.batch_size is None else range(loader.batch_size)
        indices = indices[: len(loader.dataset)] if isinstance(indices, range) else indices  # type: ignore[arg-type]
        indices = indices if isinstance(indices, (list, tuple, range)) else [indices]
        self._dataset(loader.dataset, indices, None, loader.collate_fn, single=loader.batch_sampler is None)

    def _dataset(
        self, dataset: Any, indices: Sequence[Any], transform: Any, collate: Any, single: bool = False
    ) -> None:
        if not len(indices):
            self._stop("there is no sample to read", "check the path, the filter or the split that the data comes from")
        length = f" with {count(len(dataset), 'sample')}" if hasattr(dataset, "__len__") else ""
        within, watched = _watch(dataset, self._transform)
        title = f"dataset {_name(dataset)}{length}{within}"
        self.told.steps.append(start := Step(title))
        sample = self._try(f"dataset[{indices[0]!r}]", _one, watched, indices[0])
        if self.told.steps[-1] is start:
            start.title += f"; sample {indices[0]} is"
            start.parts = parts_of(sample)
        else:
            self._tell(f"sample {indices[0]}, as the dataset gives it", sample)
        start.value = sample
        rest = [self._try(f"dataset[{i!r}]", _one, dataset, i) for i in indices[1:]]
        self._samples([sample, *rest], transform, collate, indices, single)

    def _samples(
        self, found: list[Any], transform: Any, collate: Any, indices: Sequence[Any] = (), single: bool = False
    ) -> None:
        """From samples to a batch."""
        indices = indices or range(len(found))
        if transform is not None:
            apply = _with_rng(transform)
            first = self._transform("the loader's transform", apply, transform, (found[0],))
            rest = zip(indices[1:], found[1:], strict=True)
            found = [first, *(self._try(f"the transform of sample {i}", apply, one) for i, one in rest)]
        collate = collate or default_collate
        name = "" if collate is default_collate else f", by {_name(collate)}"
        try:
            batch = collate(found[0] if single else found)
        except Exception as error:
            problem, fix = diagnose(found, indices, error, default=collate is default_collate)
            fix = fix.replace("collate_fn", self.collates)
            self._stop(f"{len(found)} samples could not be put together{name}: {problem}", fix)
        else:
            self._tell(f"{_batch_title(len(found), indices)}{name}", batch)

    def _transform(self, role: str, apply: Callable[..., Any], shown: Any, inputs: tuple[Any, ...]) -> Any:
        """Apply a transform, each of its steps by itself where it is a list of them."""
        steps = _steps_of(shown)
        if steps is None:
            value = self._try(f"{role}, {_call(shown)},", apply, *inputs)
            self._tell(f"{role}: {_call(shown)}", value, given=inputs)
            return value
        value = inputs if len(inputs) > 1 else inputs[0]
        for number, one in enumerate(steps, 1):
            several = inputs if len(inputs) > 1 else (value,)
            title = f"{role}, step {number} of {len(steps)}"
            made = self._try(f"{title}, {_call(one)},", one, *several)
            self._tell(f"{title}: {_call(one)}", made, given=several)
            value, inputs = made, made if len(inputs) > 1 else (made,)
        return value

    def _tell(self, title: str, value: Any, given: tuple[Any, ...] = ()) -> None:
        parts = parts_of(value)
        if given and len(self.told.steps) and not self.told.steps[-1].parts:  # what the first transform was given
            self.told.steps[-1].parts = parts_of(given[0] if len(given) == 1 else given)
            self.told.steps[-1].title += "; it reads"
        self.told.steps.append(Step(title, parts, value))

    def _try(self, what: str, act: Callable[..., Any], *given: Any) -> Any:
        try:
            return act(*given)
        except _Stopped:
            raise
        except Exception as error:
            got = "" if what.startswith("dataset[") else f" for {'; '.join(parts_of(given[0]).values())}"
            self._stop(
                f"{what} raised {type(error).__name__}{got}: {error}",
                "call it by hand with this sample, and see what it expects",
            )

    def _stop(self, problem: str, fix: str) -> None:
        self.told.problem, self.told.fix = problem, fix
        raise _Stopped


# ------------------------------------------------------------------------------------------------------ transforms


def _watch(dataset: Any, transform: Callable[..., Any]) -> tuple[str, Any]:
    """A shallow copy of ``dataset`` whose transforms are told step by step, and which datasets are inside of it."""
    held = getattr(dataset, "__dict__", {})
    clone = copy.copy(dataset)
    within = ""
    if hasattr(held.get("dataset"), "__getitem__"):
        inside, watched = _watch(held["dataset"], transform)
        length = f" with {count(len(held['dataset']), 'sample')}" if hasattr(held["dataset"], "__len__") else ""
        within = f", of {_name(held['dataset'])}{length}{inside}"
        clone.__dict__["dataset"] = watched
    roles = [role for role in _ROLES if callable(held.get(role))]
    for role in roles:
        if role == "transforms" and len(roles) > 1:
            continue  # torchvision keeps both once more under this name
        clone.__dict__[role] = _watched(transform, role, held[role])
    return within, clone


def _watched(transform: Callable[..., Any], role: str, one: Any) -> Callable[..., Any]:
    def apply(*inputs: Any, **named: Any) -> Any:
        return one(*inputs, **named) if named else transform(role, one, one, inputs)

    return apply


def _one(dataset: Any, index: Any) -> Any:
    return fetch_samples(dataset, [index])[0]


def _steps_of(one: Any) -> list[Any] | None:
    """Transforms that ``one`` applies one after another; None where it is a single one, or chooses among them."""
    steps = list(one) if isinstance(one, nn.Sequential) else getattr(one, "transforms", None)
    chooses = type(one).__name__.startswith(("Random", "OneOf", "SomeOf"))
    return list(steps) if isinstance(steps, (list, tuple, nn.ModuleList)) and not chooses else None


def _with_rng(transform: Callable[..., Any]) -> Callable[..., Any]:
    """``transform(sample, rng)`` as a function of the sample."""
    try:
        inspect.signature(transform).bind(None)
    except TypeError:
        return lambda sample: transform(sample, torch.Generator().manual_seed(0))
    except ValueError:
        pass
    return transform


# ------------------------------------------------------------------------------------------------------- in words


def _tell_epoch(told: Summary, data: Any) -> None:
    try:
        source = as_source(data, train=False, key=0)
    except LoopwrightError as error:
        told.problem = str(error)  # which says what to do
        return
    loader = data if isinstance(data, (DataLoader, Loader)) else getattr(source, "loader", source)
    told.batches, told.exact = source.batches, source.exact
    told.batch_size = getattr(loader, "batch_size", None)
    sizes = source.sizes(0)
    try:
        told.samples = sum(sizes) if sizes is not None else None
    except LoopwrightError as error:  # there is no tensor to count by
        told.problem = str(error)
        return
    told.workers = getattr(loader, "num_workers", getattr(loader, "workers", 0)) or 0
    length = f"{count(told.samples, 'sample')} in " if told.samples is not None else ""
    batches = "an unknown number of batches" if told.batches is None else count(told.batches, "batch")
    size = f" of at most {told.batch_size:,}" if told.batch_size else ""
    who = f"read by {count(told.workers, 'worker')}" if told.workers else "read in the training process"
    resumes = f"does not resume exactly: {'; '.join(told.exact)}" if told.exact else "resumes exactly"
    told.steps.append(Step(f"epoch: {length}{batches}{size}, {_order(data)}{who}; {resumes}"))


def _order(data: Any) -> str:
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        name = type(data.sampler).__name__
        return {"RandomSampler": "shuffled, ", "SequentialSampler": "in order, "}.get(name, f"ordered by {name}, ")
    if isinstance(data, Loader):
        return "shuffled, " if data.shuffle else "in order, "
    shuffled = not isinstance(data, (list, range)) and (is_array(data) or hasattr(data, "__getitem__"))
    return "shuffled when trained on, " if shuffled else ""


def _notes(told: Summary) -> list[str]:
    """What is no error, and seldom meant."""
    notes, last = [], next((step for step in reversed(told.steps) if step.parts), None)
    for path, words in last.parts.items() if last else ():
        where = f"{path or 'it'} "
        if words.startswith("float64"):
            notes.append(
                f"{where}is float64, and models are float32: convert it once, with .float() or astype('float32')"
            )
        if " not finite" in words:
            notes.append(f"{where}has values that are not finite; a loss computed from them is NaN")
    return notes


def _name(one: Any) -> str:
    if isinstance(one, Loader):
        return f"Loader of {_name(one.data)}"
    if isinstance(one, DataLoader):
        return f"{type(one).__name__} of {_name(one.dataset)}"
    if is_array(one) and isinstance(one, (tuple, list, Mapping)):
        return f"{with_article(type(one).__name__)} of arrays"
    return str(getattr(one, "__qualname__", type(one).__name__))


def _call(one: Any) -> str:
    """A transform on one line."""
    text = getattr(one, "__qualname__", None) or repr(one)
    text = type(one).__name__ if " object at 0x" in text else " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def _batch_title(size: int, indices: Sequence[Any] = ()) -> str:
    indices = indices or range(size)
    if isinstance(indices, range):
        return f"batch: samples 0 to {size - 1}" if size > 1 else "batch: sample 0"
    return f"batch: samples {', '.join(map(str, indices[:6]))}{', ...' if size > 6 else ''}"


def _sample(batch: Any, i: int = 0) -> Any:
    if isinstance(batch, Mapping):
        return {key: _sample(part, i) for key, part in batch.items()}
    return batch[i] if isinstance(batch, Tensor) else type(batch)([_sample(part, i) for part in batch])
