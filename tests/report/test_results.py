"""Single samples with what a model says of them, in the form that their kind asks for."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw

EVIL = "<script>alert(1)</script>"


class Length(nn.Module):
    """Scores [N, 2] of texts: the longer, the more likely of class 1."""

    def forward(self, texts: list[str]) -> Tensor:
        size = torch.tensor([float(len(text)) for text in texts])
        return torch.stack([10 - size, size - 10], dim=1)


@pytest.mark.capability("FA-18")
def test_images_are_shown_with_their_labels():
    """Results are shown by kind: images with the class that was predicted and the true one."""
    images = torch.zeros(3, 1, 4, 4)
    images[torch.arange(3), 0, 0, torch.arange(3)] = 1.0
    task = lw.Supervised(nn.Sequential(nn.Flatten(), Pick()), nn.CrossEntropyLoss())
    found = lw.report.results(task, [(images, torch.tensor([0, 1, 0]))], keep=2, classes=["left", "mid", EVIL])
    assert isinstance(found, lw.report.Results)
    assert [(one["n"], one["guess"], one["target"]) for one in found.worst] == [(2, 2, 0), (0, 0, 0)]
    page = found._repr_html_()
    assert page.count('<img src="data:image/png;base64,') == 4
    assert re.search(r'class="warn"><b>&lt;script&gt;.*?</b>', page)
    assert re.findall(r"true <b>(\w+)</b>", page) == ["left"]  # under the one that was guessed wrong
    assert EVIL not in page
    assert found.metrics["test/loss"] > 0


class Pick(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return 5 * rows[:, :3]


@pytest.mark.capability("FA-18")
def test_texts_are_a_table_of_text_target_and_prediction():
    """Results are shown by kind: a DataFrame of text, target and prediction."""
    texts, target = ["short", "quite a long one", EVIL, "tiny"], torch.tensor([0, 1, 0, 1])
    found = lw.report.results(lw.Supervised(Length(), nn.CrossEntropyLoss()), [(texts, target)], classes=["no", "yes"])
    lines = found.to_pandas()
    assert list(lines) == ["n", "text", "target", "prediction", "probability of target"]
    assert lines[["text", "target", "prediction"]].values.tolist()[:2] == [[EVIL, "no", "yes"], ["tiny", "yes", "no"]]
    assert sorted(lines["n"]) == [0, 1, 2, 3]
    assert EVIL not in found._repr_html_()


def test_rows_of_numbers_have_their_columns():
    data = [(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0], [1.0]]))]
    found = lw.report.results(lw.Supervised(First(), nn.MSELoss()), data, keep=1, columns=["age", "size"])
    assert found.to_pandas().to_dict("records") == [
        {"n": 1, "age": 3.0, "size": 5.0, "target": 1.0, "prediction": 3.0},
        {"n": 0, "age": 1.0, "size": 2.0, "target": 1.0, "prediction": 1.0},
    ]


class First(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, :1]


class Silent(lw.Task):
    def test_step(self, batch: Tensor) -> Tensor:
        return batch.mean()


def test_a_step_without_predictions_is_an_error_that_says_what_to_return():
    with pytest.raises(lw.MetricError) as error:
        lw.report.results(Silent(), [torch.ones(2)])
    assert str(error.value) == (
        "test_step returned {'loss': float32[]}, of which no samples can be shown: return 'preds' and 'target', scores "
        "[N, C] or [N] with whole numbers [N], or numbers of the same shape"
    )
