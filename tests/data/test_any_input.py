"""Every kind of data that people have: trained on, predicted, cross-validated and resumed, with the same bits."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import loopwright as lw
from anywhere import ends_alike
from loopwright.data.arrays import as_tensors, pick
from test_docs import script

N, SIZE = 14, 4  # the last batch is short
GENERATOR = np.random.default_rng(0)
X = np.where(GENERATOR.random((N, 3)) < 0.5, 0, GENERATOR.normal(size=(N, 3))).astype(np.float32)
Y = GENERATOR.integers(0, 2, N)
NAMES = ["a", "b", "c"]


class Pairs(Dataset[Any]):
    """A dataset, which may be of torch or of anybody else."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Anew:
    """Ready batches, from the first one whenever it is iterated."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        yield from batches(self.x, self.y)


class Placed(Anew):
    """Ready batches, which can say where they stand."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(x, y)
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(self.x, self.y)[self.given :]:
            self.given += 1
            yield batch
        self.given = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "Placed", "content": hashlib.sha256(self.x.tobytes()).hexdigest()}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.given = state["given"]


class Stream(IterableDataset[Any]):
    """Samples one after the other; it can say where it stands."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y, self.given = x, y, 0

    def __iter__(self) -> Iterator[Any]:
        while self.given < len(self.x):
            self.given += 1
            yield self.x[self.given - 1], self.y[self.given - 1]
        self.given = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "Stream", "content": hashlib.sha256(self.x.tobytes()).hexdigest()}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.given = state["given"]


@cache
def block() -> Any:
    """The dataset of the recipe of a data block, docs/recipes/data_block.md."""
    page = Path(__file__).parents[2] / "docs" / "recipes" / "data_block.md"
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(script(page.read_text(encoding="utf-8")), names)
    return names["Block"]


def blocked(x: Any, y: Any) -> Any:
    items = [(*row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True)]
    return block()(items, lambda item: np.array(item[:-1], x.dtype), lambda item: int(item[-1]), [0, 1])


def table(x: Any, names: list[str] = NAMES) -> Any:
    return pa.table({name: x[:, i] for i, name in enumerate(names)})


def in_chunks(x: Any) -> Any:
    return pa.concat_tables([table(x[:7]), table(x[7:7]), table(x[7:])])


def nullable(x: Any) -> Any:
    """A column of Arrow in chunks, one that can miss values, and a plain one."""
    a = pd.arrays.ArrowExtensionArray(in_chunks(x)["a"])
    return pd.DataFrame({"a": a, "b": pd.arrays.FloatingArray(x[:, 1], np.zeros(len(x), bool)), "c": x[:, 2]})


def sparse_tensor(x: Any) -> Tensor:
    return torch.from_numpy(x).to_sparse_csr()


def batches(x: Any, y: Any) -> list[Any]:
    return [(torch.from_numpy(x[i : i + SIZE]), torch.from_numpy(y[i : i + SIZE])) for i in range(0, len(x), SIZE)]


def generating(x: Any, y: Any) -> Any:
    """A generator function, which makes a stream of batches anew for each epoch."""

    def generate() -> Iterator[Any]:
        yield from batches(x, y)

    return generate


def loaded(data: Any) -> Any:
    return lw.Loader(data, SIZE)


Make = Callable[[Any, Any], Any]
KINDS: dict[str, tuple[Make, Callable[[Any], Any]]] = {  # of x and y to train on; of x alone to predict
    "numpy": (lambda x, y: loaded((x, y)), lambda x: x),
    "torch": (lambda x, y: loaded((torch.from_numpy(x), torch.from_numpy(y))), torch.from_numpy),
    "pandas": (lambda x, y: loaded((pd.DataFrame(x), pd.Series(y))), pd.DataFrame),
    "pandas, nullable": (lambda x, y: loaded((nullable(x), pd.Series(y, dtype="Int64"))), nullable),
    "arrow": (lambda x, y: loaded((table(x), pa.array(y))), table),
    "arrow, in chunks": (lambda x, y: loaded((in_chunks(x), pa.chunked_array([y[:5], y[5:]]))), in_chunks),
    "dict": (lambda x, y: loaded({"x": x, "y": y}), lambda x: {"x": x}),
    "dict of several kinds": (
        lambda x, y: loaded({"x": table(x), "y": torch.from_numpy(y), "more": {"z": scipy.sparse.coo_array(x)}}),
        lambda x: {"x": pd.DataFrame(x, columns=NAMES), "more": {"z": x}},
    ),
    "sparse": (lambda x, y: loaded((scipy.sparse.csr_array(x), y)), scipy.sparse.csr_array),
    "sparse, by columns": (lambda x, y: loaded((scipy.sparse.csc_matrix(x), y)), scipy.sparse.coo_array),
    "sparse, of torch": (lambda x, y: loaded((sparse_tensor(x), y)), sparse_tensor),
    "dataset": (lambda x, y: loaded(Pairs(x, y)), lambda x: Pairs(x, np.zeros(len(x), int))),
    "data block": (lambda x, y: loaded(blocked(x, y)), lambda x: blocked(x, np.zeros(len(x)))),
    "list of batches": (batches, lambda x: [torch.from_numpy(x)]),
    "function of batches": (generating, lambda x: generating(x, np.zeros(len(x), int))),
    "iterable of batches": (Anew, lambda x: Anew(x, np.zeros(len(x), int))),
    "iterable that knows its place": (Placed, lambda x: Placed(x, np.zeros(len(x), int))),
    "stream": (lambda x, y: DataLoader(Stream(x, y), SIZE), lambda x: Stream(x, np.zeros(len(x), int))),
}
WITHOUT_PLACE = ("function of batches", "iterable of batches")  # there is nothing to go on from
ITERATED = (*WITHOUT_PLACE, "iterable that knows its place")  # batches, one after the other
OF_NAMES = ("pandas, nullable", "arrow", "arrow, in chunks", "dict of several kinds")  # whose columns have names
OF_DOUBLES = "pandas, nullable"  # as pandas has it for columns of which values may be missing beside others
pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
SPLIT: dict[str, Make] = {  # what lw.data.folds takes
    "numpy": lambda x, y: (x, y),
    "torch": lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
    "pandas": lambda x, y: (pd.DataFrame(x), pd.Series(y)),
    "pandas, nullable": lambda x, y: (nullable(x), pd.Series(y, dtype="Int64")),
    "arrow": lambda x, y: (table(x), pa.array(y)),
    "arrow, in chunks": lambda x, y: (in_chunks(x), pa.chunked_array([y[:5], y[5:]])),
    "dict": lambda x, y: {"x": x, "y": y},
    "dict of several kinds": lambda x, y: {"x": table(x), "y": torch.from_numpy(y), "z": scipy.sparse.coo_array(x)},
    "sparse": lambda x, y: (scipy.sparse.csr_array(x), y),
    "sparse, by columns": lambda x, y: (scipy.sparse.csc_matrix(x), y),
    "sparse, of torch": lambda x, y: (sparse_tensor(x), y),
    "dataset": Pairs,
    "data block": blocked,
}


def task_of(kind: str) -> lw.Supervised:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 2))
    net = net.double() if kind in ("of doubles", OF_DOUBLES) else net
    names = {"inputs": "x", "targets": "y"} if kind.startswith("dict") else {}
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01), **names)


def fit(kind: str, x: Any = X, y: Any = Y, *, data: Any = None, resume: Any = None, **settings: Any) -> Any:
    task = task_of(kind)
    settings = {"folder": None, "progress": False, "checkpoint": False, **settings}
    run = lw.Trainer(epochs=2, seed=1, **settings).fit(
        task, KINDS[kind][0](x, y) if data is None else data, resume=resume
    )
    return task, run


def weights(task: lw.Task) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.parameters()])


def predicted(task: lw.Task, data: Any) -> Tensor:
    found: Tensor = lw.Trainer(folder=None, progress=False).predict(task, data)
    return found


def plain(kind: str) -> tuple[str, Any]:
    """The kind that is the same as ``kind`` in numbers, and its x."""
    return ("of doubles", X.astype(np.float64)) if kind == OF_DOUBLES else ("numpy", X)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_on_and_predicted_with_the_same_bits(kind: str) -> None:
    same_draws = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), SIZE)  # as a stream in a loader
    like, x = plain(kind)
    expected, _ = fit(like, data=same_draws if kind == "stream" else lw.Loader((x, Y), SIZE))
    task, _ = fit(kind)
    assert torch.equal(weights(task), weights(expected))
    as_large = lw.Loader(x, SIZE) if kind in ITERATED else x  # batches
    assert torch.equal(predicted(task, KINDS[kind][1](X)), predicted(expected, as_large))


def scores(like: str, data: Any, *, y: Any = Y, read: Callable[..., Any] = lw.Loader) -> list[float]:
    """The loss on the second part of each fold, after a fit on the first."""
    found = []
    for train, valid in lw.data.folds(data, 3, stratify=y):
        task, _ = fit(like, data=read(train, SIZE, shuffle=True, seed=1))
        found.append(lw.Trainer(folder=None, progress=False).validate(task, read(valid, SIZE))["valid/loss"])
    assert len(set(found)) == 3
    return found


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", SPLIT)
def test_every_kind_is_cross_validated_with_the_same_bits(kind: str) -> None:
    like, x = plain(kind)
    expected = scores(like, (x, Y))
    assert scores(kind, SPLIT[kind](X, Y)) == expected


def as_it_is(data: Any, size: int, **settings: Any) -> Any:
    return data


@pytest.mark.capability("B-30")
def test_a_list_of_batches_is_cross_validated_by_batches() -> None:
    whole = batches(X, Y)
    numbers = lw.data.folds(np.arange(len(whole)), 3)
    found = [([id(one) for one in train], [id(one) for one in valid]) for train, valid in lw.data.folds(whole, 3)]
    assert found == [([id(whole[i]) for i in train], [id(whole[i]) for i in valid]) for train, valid in numbers]
    assert len(scores("numpy", whole, y=None, read=as_it_is)) == 3


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", [*ITERATED, "stream"])
def test_what_comes_one_after_the_other_is_cross_validated_as_the_error_says(kind: str) -> None:
    """Its samples have no numbers; put into a list, they have."""
    data = Stream(X, Y) if kind == "stream" else KINDS[kind][0](X, Y)
    with pytest.raises(
        lw.DataError, match=r"have no numbers\. Where they fit into memory, make a list of them"
    ) as caught:
        lw.data.folds(data, 3)
    text = str(caught.value)
    names: dict[str, Any] = {"torch": torch, "data": data, "generate": data}
    if kind == "stream":
        assert ", samples = list(data), and split" in text
        names["samples"] = list(data)
    split = eval(text.rpartition(": ")[2], names)
    if kind == "stream":
        assert scores("numpy", split) == scores("numpy", Pairs(X, Y))
    else:
        assert scores("numpy", split, y=None, read=as_it_is) == scores("numpy", batches(X, Y), y=None, read=as_it_is)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resumes_after_each_step_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    """What has no place is read again, which has to be asked for: it may not give the same."""

    def again(resume: Any, **settings: Any) -> lw.Run:
        if resume is not None and kind in WITHOUT_PLACE:
            with pytest.raises(lw.CheckpointError, match="has no position to save, as an iterable with sta"):
                fit(kind, resume=resume, **settings)
            resume = lw.Resume(resume, how="approximate")
        run: lw.Run = fit(kind, resume=resume, **settings)[1]
        assert (run.exact is True) == (kind not in WITHOUT_PLACE)
        return run

    assert ends_alike(again, tmp_path) == 7


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_and_schema_of_every_kind_are_kept_with_the_run(kind: str, tmp_path: Path) -> None:
    """Of what is only iterated, the fingerprint is its name: to read it could be done once only."""
    _, run = fit(kind, folder=tmp_path, checkpoint=True)
    kept = json.loads((next((run.folder / "checkpoints").glob("step-*")) / "state.json").read_text())["data"]
    assert kept["fingerprint"] == json.loads((run.folder / "run.json").read_text())["data"]
    assert ("content" in kept["fingerprint"]) == (kind not in WITHOUT_PLACE)
    paths = {"['x']", "['y']"} if kind.startswith("dict") else {"[0]", "[1]"}
    assert paths <= kept["schema"].keys()
    assert bool(kept["columns"]) == (kind in OF_NAMES)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_PLACE])
def test_other_data_is_named_when_a_run_goes_on(kind: str, tmp_path: Path) -> None:
    """By the fingerprint of the data, which the checkpoint keeps."""
    _, run = fit(kind, folder=tmp_path, checkpoint=lw.Checkpoint("3 steps", keep=9))
    path = run.folder / "checkpoints" / "step-00000003"
    other = X.copy()
    other[X != 0] += 1
    with pytest.raises(lw.LoopwrightError) as caught:
        fit(kind, other, resume=path)
    assert "other values than when the checkpoint was written" in str(caught.value)


def known_here(kind: str, folder: Path, data: Any = None) -> lw.Task:
    """A task that was trained in this process."""
    return fit(kind, data=data)[0]  # type: ignore[no-any-return]


def known_by_its_checkpoint(kind: str, folder: Path, data: Any = None) -> lw.Task:
    """Another task, as in another process, into which the weights of a run were loaded."""
    _, run = fit(kind, data=data, folder=folder, checkpoint=True)
    task = task_of(kind)
    lw.load_weights(task.module, run.folder)
    return task


def known_since_it_went_on(kind: str, folder: Path, data: Any = None) -> lw.Task:
    """Another task, whose run had ended and was taken up again."""
    fit(kind, data=data, folder=folder, checkpoint=True)
    task, run = fit(kind, data=data, folder=folder, checkpoint=True, resume="auto")
    assert run.resumed_from is not None
    return task  # type: ignore[no-any-return]


KNOWN = (known_here, known_by_its_checkpoint, known_since_it_went_on)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("known", [known_here, known_by_its_checkpoint])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_that_has_drifted_is_named_at_predict(kind: str, known: Any, tmp_path: Path) -> None:
    task = known(kind, tmp_path)
    assert predicted(task, KINDS[kind][1](X)).shape == (N, 2)
    with pytest.raises(lw.DataError) as caught:
        predicted(task, KINDS[kind][1](X.astype(np.float64)))
    if kind == "pandas, nullable":
        says = (
            "column 'a' of the predict data is double[pyarrow], and was float[pyarrow] in training; column 'b' of the"
        )
        how = "Make it as it was, as by data.astype({'a': 'float[pyarrow]', 'b': 'Float32', 'c': 'float32'})"
    elif kind in OF_NAMES:
        data = "the predict data" + "['x']" * kind.startswith("dict")
        says = f"column 'a' of {data} is float64, and was float32 in training; column 'b' of {data} is float64, and"
        how = "Make it as it was, as by data.astype({'a': 'float32', 'b': 'float32', 'c': 'float32'})"
    else:
        says = "has dtype torch.float64, and the model was trained on torch.float32"
        how = "Make this data as the training data was made, or train on data like this"
    assert says in str(caught.value)
    assert how in str(caught.value)


WIDER = np.concatenate([X, X[:, :1]], 1)  # by a column


def wider(kind: str) -> Any:
    """Data to predict with a column more than in training; without names, which would be a drift of their own."""
    if kind == "dict of several kinds":
        return {"x": pd.DataFrame(WIDER), "more": {"z": X}}
    if kind in OF_NAMES:
        return WIDER.astype(np.float64) if kind == OF_DOUBLES else WIDER
    return KINDS[kind][1](WIDER)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("known", [known_here, known_by_its_checkpoint])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_size_is_named_where_the_model_fails_with_it(kind: str, known: Any, tmp_path: Path) -> None:
    task = known(kind, tmp_path)
    with (
        pytest.warns(lw.LoopwrightWarning, match=r"has shape \(any, 4\), and the model was trained on \(any, 3\)\. If"),
        pytest.raises(lw.DataError) as caught,
    ):
        predicted(task, wider(kind))
    said = str(caught.value)
    says = "has shape (any, 4), and the model was trained on (any, 3); RuntimeError: mat1 and mat2 shapes"
    assert re.match(rf"predict batch(\[0\]|\['x'\])? {re.escape(says)}", said)
    assert said.endswith(". Make this data as the training data was made, or train on data like this")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert any(note.startswith("[loopwright] in predict, batch 1; batch: ") for note in caught.value.__notes__)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "arrow" not in kind and kind != OF_DOUBLES])
@pytest.mark.parametrize("look", ["valid", "test"])
def test_a_batch_of_another_size_to_evaluate_on_is_named_as_well(look: str, kind: str) -> None:
    task, trainer = fit(kind)[0], lw.Trainer(folder=None, progress=False)
    data = loaded({**wider(kind), "y": Y}) if kind == "dict of several kinds" else KINDS[kind][0](WIDER, Y)
    with (
        pytest.warns(lw.LoopwrightWarning, match=r"has shape \(any, 4\), and the model was trained on \(any, 3\)"),
        pytest.raises(lw.DataError, match=rf"^{look} batch\[.*\] has shape \(any, 4\), and the .* RuntimeError: mat1"),
    ):
        (trainer.validate if look == "valid" else trainer.test)(task, data)


def frame(names: list[str]) -> Any:
    return pd.DataFrame(WIDER[:, : len(names)], columns=names)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["b", "a", "c"], "the columns of the predict data come as 'b', 'a', 'c', and were 'a', 'b', 'c' in training."),
        (["a", "b", "d"], "the predict data is without 'c' and with 'd', which is new: the model was trained on the "),
        (
            ["a", "b", "c", "d"],
            "the predict data is with 'd', which is new: the model was trained on the columns 'a', '",
        ),
        (["a", "b"], "the predict data is without 'c': the model was trained on the columns 'a', 'b', 'c'. Choose"),
    ],
)
@pytest.mark.parametrize("kind", ["pandas", "arrow"])
def test_columns_of_another_name_or_order_are_named_at_predict(kind: str, names: list[str], says: str) -> None:
    make = {"pandas": frame, "arrow": lambda names: table(WIDER, names)}[kind]
    task, _ = fit(kind, data=(make(NAMES), Y))
    assert predicted(task, make(NAMES)).shape == (N, 2)
    with pytest.raises(lw.DataError) as caught:
        predicted(task, lw.Loader(make(names), 5))
    assert str(caught.value).startswith(says)
    assert str(caught.value).endswith(" Choose them by name, in that order: data[['a', 'b', 'c']]")


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("known", KNOWN)
def test_columns_of_another_order_are_named_wherever_it_was_trained(known: Any, tmp_path: Path) -> None:
    task, trainer = known("pandas", tmp_path, (frame(NAMES), Y)), lw.Trainer(folder=None, progress=False)
    for kind, look in {"predict": trainer.predict, "valid": trainer.validate, "test": trainer.test}.items():
        look(task, (frame(NAMES), Y))
        with pytest.raises(lw.DataError, match=rf"^the columns of the {kind} data\[0\] come as 'c', 'b', 'a', and wer"):
            look(task, (frame(["c", "b", "a"]), Y))


def copied(task: Any) -> Any:
    return copy.deepcopy(task)


def pickled(task: Any) -> Any:
    return pickle.loads(pickle.dumps(task))


def around_the_module(task: Any) -> Any:
    """A new task, as somebody writes it who was given the module."""
    return lw.Supervised(task.module, nn.CrossEntropyLoss())


def of_a_saved_module(task: Any) -> Any:
    file = io.BytesIO()
    torch.save(task.module, file)
    file.seek(0)
    return lw.Supervised(torch.load(file, weights_only=False), nn.CrossEntropyLoss())


HANDED_ON = (copied, pickled, around_the_module, of_a_saved_module)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("handed_on", HANDED_ON)
@pytest.mark.parametrize("known", KNOWN)
def test_a_copy_and_another_task_around_the_module_know_what_it_was_trained_on(
    known: Any, handed_on: Any, tmp_path: Path
) -> None:
    task = handed_on(known("pandas", tmp_path, (frame(NAMES), Y)))
    assert predicted(task, frame(NAMES)).shape == (N, 2)
    with pytest.raises(lw.DataError, match=r"^the columns of the predict data come as 'c', 'b', 'a', and were 'a', 'b"):
        predicted(task, frame(["c", "b", "a"]))
    with pytest.raises(lw.DataError, match=r"has dtype torch\.float64, and the model was trained on torch\.float32"):
        predicted(task, [torch.from_numpy(X).double()])


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_a_copy_knows_the_schema(kind: str) -> None:
    task, halves = fit(kind)[0], torch.from_numpy(X).half()
    for handed_on in HANDED_ON:
        with pytest.raises(lw.DataError, match=r"has dtype torch\.float16, and the model was trained on torch\.float"):
            predicted(handed_on(task), [{"x": halves}] if kind.startswith("dict") else [halves])


def test_what_a_module_remembers_is_no_part_of_its_state() -> None:
    before, task = task_of("pandas").module, fit("pandas", data=(frame(NAMES), Y))[0]
    assert task.module.state_dict().keys() == before.state_dict().keys()
    assert repr(task.module) == repr(before)
    assert len(pickle.dumps(task.module)) < len(pickle.dumps(before)) + 400


def test_a_task_with_several_models_remembers_by_itself() -> None:
    class Two(lw.Supervised):
        def models(self) -> dict[str, nn.Module]:
            return {"first": self.module[0], "second": self.module[2]}

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    task = Two(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    lw.Trainer(epochs=1, folder=None, progress=False).fit(task, (frame(NAMES), Y))
    with pytest.raises(lw.DataError, match="come as 'c', 'b', 'a'"):
        predicted(copy.deepcopy(task), frame(["c", "b", "a"]))
    assert predicted(lw.Supervised(net[0], nn.MSELoss()), frame(["c", "b", "a"])).shape == (N, 4)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("data", [X, torch.from_numpy(X), pd.DataFrame(X), scipy.sparse.csr_array(X), lw.Loader(X, 5)])
@pytest.mark.parametrize("make", [frame, lambda names: table(X, names)], ids=["pandas", "arrow"])
def test_columns_that_had_names_in_training_and_have_none_are_told(make: Any, data: Any) -> None:
    task, _ = fit("pandas", data=(make(NAMES), Y))
    with pytest.warns(lw.LoopwrightWarning) as told:
        assert torch.equal(predicted(task, data), predicted(task, make(NAMES)))
    assert [str(one.message) for one in told] == [
        "the columns of the predict data have no names; taken in the order of training: a, b, c"
    ]


def test_columns_of_another_order_to_validate_on_are_named_before_training() -> None:
    with pytest.raises(lw.PlanError, match=r"the columns of the valid data\[0\] come as 'c', 'b', 'a', and were"):
        lw.Trainer(epochs=1, folder=None, progress=False).fit(
            task_of("pandas"), (frame(NAMES), Y), (frame(["c", "b", "a"]), Y)
        )


@pytest.mark.parametrize("known", [known_here, known_by_its_checkpoint])
@pytest.mark.parametrize(("now", "is_drift"), [("int32", False), ("float64", True)])
def test_a_column_of_another_type_is_named_if_it_holds_what_that_of_training_did_not(
    now: str, is_drift: bool, known: Any, tmp_path: Path
) -> None:
    """Beside a column of floats, the batch is one of floats all the same."""
    data = pd.DataFrame({"a": np.arange(N), "b": X[:, 1].astype("float64"), "c": X[:, 2]})
    task = known("of doubles", tmp_path, (data, Y))
    other = data.astype({"a": now})
    if not is_drift:
        assert predicted(task, other).shape == (N, 2)
        return
    with pytest.raises(lw.DataError) as caught:
        predicted(task, other)
    assert str(caught.value) == (
        f"column 'a' of the predict data is {now}, and was int64 in training. Make it as it was, as by "
        "data.astype({'a': 'int64'})"
    )


def test_every_column_of_a_wide_table_is_compared_when_a_run_goes_on(tmp_path: Path) -> None:
    """Also those of which the fingerprint does not tell: it has the first hundred."""

    def fit(names: list[str], resume: Any = None) -> lw.Run:
        net = nn.Linear(len(names), 2)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
        trainer = lw.Trainer(
            epochs=2, seed=1, folder=tmp_path, progress=False, checkpoint=lw.Checkpoint("1 step", keep=9)
        )
        return trainer.fit(task, (pd.DataFrame(np.ones((N, len(names)), np.float32), columns=names), Y), resume=resume)

    names = [f"c{i}" for i in range(120)]
    run = fit(names)
    assert run.folder is not None
    first = run.folder / "checkpoints" / "step-00000001"
    assert fit(names, first).resumed_from == first
    with pytest.raises(lw.CheckpointError, match=r"the train data\[0\] is without 'c119' and with 'x', which is new"):
        fit([*names[:-1], "x"], first)


def test_a_part_of_a_model_knows_no_data_and_a_fit_begins_to_know_another(tmp_path: Path) -> None:
    _, run = fit("pandas", data=(frame(NAMES), Y), folder=tmp_path, checkpoint=True)
    task = task_of("pandas")
    lw.load_weights(task.module, run.folder, only="0.*")
    assert predicted(task, frame(["x", "y", "z"])).shape == (N, 2)
    lw.load_weights(task.module, run.folder)
    lw.Trainer(epochs=1, folder=None, progress=False).fit(task, (frame(["x", "y", "z"]), Y))
    assert predicted(task, frame(["x", "y", "z"])).shape == (N, 2)


def test_a_rehearsal_leaves_nothing_behind() -> None:
    task = task_of("pandas")
    rehearse = lw.Trainer(epochs=1, folder=None, progress=False, debug=lw.Debug(dev_run=1))
    rehearse.fit(task, (frame(["x", "y", "z"]), Y))
    assert predicted(task, frame(NAMES)).shape == (N, 2)


def test_a_rehearsal_forgets_nothing(tmp_path: Path) -> None:
    task = known_by_its_checkpoint("pandas", tmp_path, (frame(NAMES), Y))
    rehearse = lw.Trainer(epochs=1, folder=None, progress=False, debug=lw.Debug(dev_run=1))
    rehearse.fit(task, (frame(["x", "y", "z"]), Y))
    with pytest.raises(lw.DataError, match="without 'a', 'b', 'c'"):
        predicted(task, frame(["x", "y", "z"]))


@pytest.mark.parametrize("columns", [
    {"a": np.arange(9), "b": np.linspace(0, 1, 9)}, {"a": np.arange(9) < 4, "b": np.arange(9)},
    {"a": np.arange(9, dtype=np.int16), "b": np.arange(9, dtype=np.float32), "c": np.arange(9, dtype=np.uint8)},
])  # fmt: skip
def test_columns_that_lie_apart_give_the_bits_of_the_whole_table(columns: dict[str, Any]) -> None:
    rows, frame = torch.tensor([8, 0, 3, 3]), pd.DataFrame(columns)
    whole = frame.to_numpy() if frame.to_numpy().dtype.kind in "biuf" else frame.to_numpy(np.float64)
    found = pick(as_tensors(frame), rows)
    assert found.dtype == torch.from_numpy(whole).dtype
    assert torch.equal(found, torch.from_numpy(whole)[rows])
    assert torch.equal(
        pick(as_tensors(pa.table(columns)), rows), torch.from_numpy(np.column_stack([*columns.values()]))[rows]
    )


numbers = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-9, 9)), min_size=1, max_size=12).map(lambda v: (v, "int64")),
    st.lists(st.one_of(st.none(), st.floats(-9, 9, width=32)), min_size=1, max_size=12).map(lambda v: (v, "float32")),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=1, max_size=12).map(lambda v: (v, "bool")),
)


@hypothesis.settings(max_examples=40)
@given(numbers, st.lists(st.integers(0, 12), max_size=4), st.data())
def test_columns_in_chunks_and_with_missing_values_give_the_numbers_of_one_whole_column(
    column: tuple[list[Any], str], cuts: list[int], data: st.DataObject
) -> None:
    """Missing is nan; of whole numbers and truths of which some are missing all are doubles, whichever are picked."""
    values, kind = column
    missing = None in values
    whole = np.array(values, np.dtype(kind) if not missing else "float32" if kind == "float32" else "float64")
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=8)), dtype=torch.int64)
    ends = sorted({min(cut, len(values)) for cut in cuts} | {0, len(values)})
    pieces = [pa.array(values[a:b], getattr(pa, kind + "_" * (kind == "bool"))()) for a, b in pairwise(ends)]
    names = {"int64": "Int64", "float32": "Float32", "bool": "boolean"}
    chunked = pa.chunked_array(pieces)
    for one in (
        chunked,
        pa.table({"a": chunked}),
        pd.Series(pd.arrays.ArrowExtensionArray(chunked)),
        pd.Series(pd.array(values, dtype=names[kind])),
        pd.DataFrame({"a": pd.array(values, dtype=names[kind])}),
    ):
        found = pick(as_tensors(one), rows)
        assert found.dtype == torch.from_numpy(whole).dtype
        np.testing.assert_array_equal(found.numpy().reshape(-1), whole[rows.numpy()])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 12), st.randoms(use_true_random=False))
def test_rows_of_a_sparse_tensor_are_those_of_the_dense_one(n: int, wide: int, entries: int, chance: Any) -> None:
    """In every form, also where one place has several entries, which are added up."""
    at = torch.tensor([[chance.randrange(n), chance.randrange(wide)] for _ in range(entries)]).reshape(-1, 2).T.long()
    sparse = torch.sparse_coo_tensor(at, torch.arange(1.0, entries + 1), (n, wide), check_invariants=True)
    dense, rows = sparse.to_dense(), torch.tensor([chance.randrange(n) for _ in range(4)])
    for one in (
        sparse.coalesce().to_sparse_csr(),
        sparse.coalesce().to_sparse_csc(),
        dense.to_sparse_bsr((1, 1)),
        dense.to_sparse_bsc((1, 1)),
    ):
        assert torch.equal(pick(as_tensors(one), rows), dense[rows])


def test_a_table_and_a_matrix_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(lw.DataError, match=r"data\[0\] has columns that are not numbers: 'name' \(string\)\. Turn"):
        lw.Loader((pa.table({"name": ["a"], "size": [1]}), np.zeros(1)))
    with pytest.raises(lw.DataError, match=r"data is a sparse array of shape \(3,\) and dtype float64; expected"):
        lw.Loader(scipy.sparse.coo_array(np.ones(3)))


def test_samples_of_a_sparse_matrix_are_transformed_as_any_others() -> None:
    (batch,) = lw.Loader((scipy.sparse.csr_array(X), Y), N, transform=lambda pair: (pair[0] + 1, pair[1]))
    assert torch.equal(batch[0], torch.from_numpy(X) + 1)
