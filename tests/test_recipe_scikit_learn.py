"""The recipe of a scikit-learn estimator, over each kind of data: fit, predict, search, pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from test_docs import script

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "scikit_learn.md"
N = 90
X = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
Y = np.where(X[:, 0] + X[:, 1] > 0, "yes", "no")


@cache
def recipe() -> dict[str, Any]:
    """What the page defines, without its example."""
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(script(PAGE.read_text(encoding="utf-8")).partition("\ndef make_net")[0], names)
    return names


def classifier(**settings: Any) -> Any:
    return recipe()["Classifier"](Net, **settings)


class Net(nn.Module):
    """Takes rows of numbers, pictures, or a dict of numbers, categories and pictures."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 1, _weight=torch.zeros(3, 1))
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, dict):
            x = torch.cat([x["age"][:, None], x["image"].flatten(1)], 1) + self.words(x["word"])
        x = x.mean(1) * 4 - 2 if x.dim() == 4 else x  # colours of a picture, from -2 to 2
        return self.net(x.flatten(1))  # type: ignore[no-any-return]


class ImageFolder(Dataset[Any]):
    """What torchvision's has, and reads as it does: a folder for each class, with an image in each file."""

    def __init__(self, root: Path, transform: Any = None) -> None:
        self.root, self.transform = root, transform
        self.classes = sorted(one.name for one in root.iterdir() if one.is_dir())
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(str(one), self.class_to_idx[name]) for name in self.classes
                        for one in sorted((root / name).glob("*.png"))]  # fmt: skip
        self.imgs, self.targets = self.samples, [target for _, target in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        return image if self.transform is None else self.transform(image), target


def to_tensor(image: Any) -> Tensor:
    """As torchvision's: (channels, height, width) from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def folder_of_images(root: Path) -> ImageFolder:
    """PNG files of 2 x 2 pixels, whose first two say which class it is, in a folder for each class."""
    for i in range(N):
        pixels = np.uint8(np.clip(128 + 60 * X[i], 0, 255)).reshape(2, 2)
        file = root / Y[i] / f"{i:03}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels, "L").save(file)
    return ImageFolder(root, to_tensor)


def heterogeneous() -> dict[str, Any]:
    """A float column, categories and images, of pandas, NumPy and torch; a column of text that the net leaves out."""
    images = torch.from_numpy(X[:, 1:]).reshape(N, 1, 3)
    return {"age": pd.Series(X[:, 0]), "word": np.arange(N) % 3, "image": images, "name": [f"n{i}" for i in range(N)]}


KINDS: dict[str, Any] = {
    "numpy": lambda root: (X, Y),
    "torch": lambda root: (torch.from_numpy(X), torch.from_numpy(X[:, 0] + X[:, 1] > 0)),
    "pandas": lambda root: (pd.DataFrame(X, columns=list("abcd")), pd.Series(Y)),
    "sparse": lambda root: (scipy.sparse.csr_matrix(X), Y),
    "dict of several kinds": lambda root: (heterogeneous(), Y),
    "folder of images": lambda root: (folder := folder_of_images(root), folder.targets),
}
GRID = {"lr": [1e-5, 0.03], "module": [{"width": 3}, {"width": 8}]}


@pytest.mark.capability("SK-13")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_is_fitted_and_predicted(kind: str, tmp_path: Path) -> None:
    x, y = KINDS[kind](tmp_path)
    one = classifier(lr=0.03, epochs=12)
    assert one.fit(x, y) is one
    assert one.predict_proba(x).shape == (N, 2)
    assert set(one.predict(x)) == set(np.unique(np.asarray(y)))
    assert one.score(x, y) > 0.9


@pytest.mark.capability("SK-13")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_is_searched(kind: str, tmp_path: Path) -> None:
    """By GridSearchCV itself; what takes a plain dict hands it the rows of that."""
    x, y = KINDS[kind](tmp_path)
    search = (recipe()["Search"] if isinstance(x, dict) else GridSearchCV)(
        classifier(epochs=12), GRID, cv=3, error_score="raise"
    )
    assert isinstance(search, GridSearchCV)
    search.fit(x, y)
    assert search.best_params_["lr"] == 0.03
    assert search.best_score_ > 0.8
    assert np.mean(search.predict(x) == np.asarray(y)) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_is_scored_in_folds_and_goes_through_a_pipeline(kind: str, tmp_path: Path) -> None:
    x, y = KINDS[kind](tmp_path)
    x, one = recipe()["rows"](x), classifier(lr=0.03, epochs=12)
    assert cross_val_score(one, x, y, cv=3, scoring="roc_auc", error_score="raise").min() > 0.8
    assert make_pipeline(FunctionTransformer(), one).fit(x, y).score(x, y) == one.score(x, y)


def test_kinds_that_hold_the_same_numbers_are_predicted_alike() -> None:
    def found(x: Any) -> Any:
        return classifier(epochs=3).fit(x, Y).predict_proba(x)

    whole, same = found(X), {kind: KINDS[kind](None)[0] for kind in ("torch", "pandas", "sparse")}
    for x in (*same.values(), list(torch.from_numpy(X))):
        np.testing.assert_array_equal(found(x), whole)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.from_numpy(X)


def generate() -> Iterator[Any]:
    yield from torch.from_numpy(X)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("stream", [Stream(), generate, generate()], ids=["stream", "function", "iterator"])
def test_what_has_no_rows_is_cross_validated_as_a_list_of_its_samples(stream: Any) -> None:
    one, name = classifier(epochs=2), type(stream).__name__
    with pytest.raises(TypeError, match=f"^{name} has no rows to take: make a list of its samples, where they fit"):
        one.fit(stream, Y)
    samples = list(stream() if callable(stream) else stream)
    scores = cross_val_score(one, samples, Y, cv=3, scoring="roc_auc", error_score="raise")
    np.testing.assert_array_equal(scores, cross_val_score(one, X, Y, cv=3, scoring="roc_auc", error_score="raise"))


def test_rows_are_read_when_they_are_needed(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path)
    some = recipe()["rows"](folder)[[5, 2, 7]][1:]
    folder.samples[5] = ("no such file", 0)
    assert some.shape == (2,)
    assert torch.equal(some[0], folder[2][0])
    with pytest.raises(FileNotFoundError):
        folder[5]
