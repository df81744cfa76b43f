"""``lw.Report`` notes what a page needs, changes nothing, and costs no run when it fails."""

from __future__ import annotations

import base64
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.report.samples import Samples
from tiny import acts, bits, classifier, same, samples, seed_all


def fitted(folder: Path, *callbacks: lw.Callback, task: Any = None, data: Any = None, **settings: Any) -> lw.Run:
    seed_all(0)
    net = classifier(dropout=0.2, batch_norm=True)
    task = task or lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
    data = data or lw.Loader(samples(23), batch_size=6, shuffle=True)
    given = {"epochs": 2, "progress": False, "name": "net", "seed": 0, **settings}
    return lw.Trainer(folder=folder, callbacks=callbacks, **given).fit(task, data, valid=data)


def part(run: lw.Run, name: str) -> Any:
    return json.loads((run.folder / "report" / f"{name}.json").read_text())


def test_a_report_changes_no_bit(tmp_path):
    runs = [fitted(tmp_path / "a"), fitted(tmp_path / "b", lw.Report())]
    assert same(*(bits(run.task, *run.optimizers.values()) for run in runs))
    assert not any(module._forward_pre_hooks for module in runs[1].task.modules())


def test_the_loss_of_every_step_is_kept(tmp_path):
    run = fitted(tmp_path, lw.Report())
    kept = load_file(run.folder / "report" / "losses.safetensors")["loss"]
    assert kept.tolist() == list(run.history.losses["loss"])
    assert len(kept) == 8


def test_the_layers_are_shown_with_their_shapes(tmp_path):
    summary = part(fitted(tmp_path, lw.Report()), "about")["summary"]
    assert summary["rows"][1] == ["  0 Linear", "[2, 5]", "[2, 8]", "48", "160"]
    assert summary["parameters"] == 91


class OwnTask(lw.Task):
    """Two models, called with more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def training_step(self, batch: Any) -> Any:
        out = self.head(self.body(batch[0]))
        return {"loss": nn.functional.cross_entropy(out, batch[1]), "preds": out, "target": batch[1]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_task_of_ones_own_is_reported(tmp_path):
    run = fitted(tmp_path, lw.Report(), task=OwnTask())
    assert part(run, "about")["summary"]["parameters"] == 24 + 15
    assert sum(map(sum, part(run, "valid")["counts"])) == 23


def test_a_test_afterwards_is_added_to_the_page(tmp_path):
    report = lw.Report(classes=["a", "b", "c"])
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer = lw.Trainer(epochs=1, folder=tmp_path, progress=False, callbacks=[report])
    run = trainer.fit(task, [samples(6)])
    assert "confusions" not in report.path.read_text()
    found = trainer.test(task, [samples(9)])
    page = report.path.read_text()
    assert "Test: confusions" in page
    assert part(run, "test")["metrics"] == found
    before = page
    trainer.test(
        lw.Supervised(classifier(), nn.CrossEntropyLoss()), [samples(9)]
    )  # of another task: no part of this run
    assert report.path.read_text() == before


def test_warnings_that_come_up_are_noted_and_still_shown(tmp_path):
    def warn(run: lw.Run) -> None:
        warnings.warn("the lamp <flickers>", UserWarning, stacklevel=1)

    front = warnings.showwarning
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = fitted(tmp_path, lw.Report(), acts(on_epoch_end=warn))
    assert part(run, "warnings") == [{"kind": "UserWarning", "text": "the lamp <flickers>", "times": 2}]
    assert [str(one.message) for one in seen] == ["the lamp <flickers>"] * 2
    assert "the lamp &lt;flickers&gt;" in (run.folder / "report.html").read_text()
    assert warnings.showwarning is front


def test_fits_may_nest(tmp_path):
    def within(run: lw.Run) -> None:
        warnings.warn("inner", UserWarning, stacklevel=1)

    def inner(run: lw.Run) -> None:
        if run.progress.epoch == 1:
            warnings.warn("outer", UserWarning, stacklevel=1)
            runs.append(fitted(tmp_path / "inner", lw.Report(), acts(on_epoch_end=within)))

    runs: list[lw.Run] = []
    front = warnings.showwarning
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        outer = fitted(tmp_path / "outer", lw.Report(), acts(on_epoch_end=inner))
    assert [one["text"] for one in part(runs[0], "warnings")] == ["inner"]
    assert [one["text"] for one in part(outer, "warnings")] == ["outer", "inner"]
    assert warnings.showwarning is front


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("the <cat> sat on it"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_ends_by_an_error_has_its_report(tmp_path, error, status):
    report = lw.Report()

    def fail(run: lw.Run, result: Any) -> None:
        if run.progress.step == 5:
            raise error

    with pytest.raises(type(error)):
        fitted(tmp_path, report, acts(on_step_end=fail), capsule=False)
    page = report.path.read_text()
    assert f'class="badge {status}"' in page
    assert "Validation: confusions" in page
    if status == "failed":
        assert "<strong>RuntimeError after step 5</strong><pre>the &lt;cat&gt; sat on it" in page


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    def block(run: lw.Run) -> None:
        (run.folder / "report").write_text("in the way")

    with pytest.warns(lw.LoopwrightWarning) as told:
        run = fitted(tmp_path, lw.Report(), acts(on_epoch_end=block))
    assert run.status == "done"
    assert {str(one.message).partition(":")[0] for one in told} == {
        "the losses of the run could not be written", "the report could not be written"
    }  # fmt: skip


def test_without_a_folder_it_is_refused_before_the_start():
    with pytest.raises(
        lw.PlanError, match=re.escape("lw.Report writes into the run folder, and there is none: Trainer(folder=")
    ):
        fitted(None, lw.Report())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"classes": "cat"}, "Report(classes='cat'): expected a list of names, such as ['cat']"),
        ({"columns": "age"}, "Report(columns='age'): expected a list of names, such as ['age']"),
        ({"show": 3}, "Report(show=3) cannot be called; pass a function of a batch"),
        ({"keep": -1}, "Report(keep=-1): expected a whole number from 0 to 1000"),
    ],
)
def test_wrong_settings_say_what_is_right(settings, told):
    with pytest.raises(lw.SettingError) as error:
        lw.Report(**settings)
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"classes": ["a", "b"]}, "classes=['a', 'b'] names 2 classes, and the predictions have 3: "
                                  "give 3 names, in the order of the scores"),
        ({"columns": ["x", "y"]}, "columns=['x', 'y'] names 2 columns, the samples have 5: give 5 names"),
        ({"columns": ["x"], "show": lambda batch: ["text"] * len(batch[1])},
         "columns=['x'] is for rows of a table, and the samples are none: leave it out"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_told_once_where_the_run_was_started(tmp_path, settings, told):
    with warnings.catch_warnings(record=True, action="always") as caught:
        run = fitted(tmp_path, lw.Report(**settings))
    assert [(str(one.message), one.filename) for one in caught] == [(f"lw.Report: {told}", __file__)]
    assert f"lw.Report: {told}".replace("'", "&#x27;") in (run.folder / "report.html").read_text()
    task = lw.Supervised(classifier(), nn.CrossEntropyLoss())
    with pytest.raises(lw.SettingError, match=f"^lw.report.results: {re.escape(told)}$"):
        lw.report.results(task, [samples(9)], **settings)


def test_names_of_classes_for_numbers_are_told(tmp_path):
    net = nn.Linear(2, 1)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
    data = [(torch.ones(4, 2), torch.zeros(4, 1))]
    says = r"lw.Report: classes=\['a'\] is for classes, and the predictions are numbers: leave it out"
    with pytest.warns(lw.LoopwrightWarning, match=says):
        fitted(tmp_path, lw.Report(classes=["a"]), task=task, data=data)


# ------------------------------------------------------------------------------------------------ what is kept


def seen_of(batches: list[tuple[dict[str, Any], Any]], **settings: Any) -> dict[str, Any]:
    seen = Samples(keep=settings.pop("keep", 2), **settings)
    for output, batch in batches:
        seen.add(output, batch)
    return seen.as_dict()


def test_the_worst_and_the_best_of_all_batches_are_kept():
    chances = torch.tensor([0.9, 0.2, 0.6, 0.05, 0.99, 0.4])
    preds = torch.stack([chances, 1 - chances], dim=1)
    zeros, inputs = torch.zeros(6, dtype=torch.long), torch.arange(6.0)[:, None]
    parts = (slice(i, i + 2) for i in (0, 2, 4))
    batches = [({"preds": preds[part], "target": zeros[part]}, [inputs[part]]) for part in parts]
    told = seen_of(batches)
    assert [(one["n"], one["row"], one["guess"]) for one in told["worst"]] == [(3, [3.0], 1), (1, [1.0], 1)]
    assert [one["n"] for one in told["best"]] == [4, 0]
    assert told["worst"][0]["p"] == pytest.approx(0.05)
    assert told["counts"] == [[3, 3], [0, 0]]


def test_numbers_are_ranked_by_their_error():
    target = torch.arange(10.0)
    told = seen_of([({"preds": target + target**2 / 10, "target": target}, {"x": target, "y": target})], keep=1)
    assert told["kind"] == "numbers"
    assert told["points"][9] == pytest.approx((9.0, 17.1))
    assert (told["worst"][0]["n"], told["best"][0]["n"]) == (9, 0)
    assert told["worst"][0]["row"] == [9.0]


def test_points_of_many_samples_are_a_fixed_share_of_them():
    batches = [
        ({"preds": torch.arange(i, i + 700.0), "target": torch.arange(i, i + 700.0)}, None) for i in range(0, 7000, 700)
    ]
    points = [point[0] for point in seen_of(batches)["points"]]
    assert 700 <= len(points) <= 1500
    assert set(np.diff(points)) == {8.0}


LOGIT = math.log(3)


@pytest.mark.parametrize(
    ("preds", "target", "loss", "p"),
    [
        ([[0.0, LOGIT]], [1], None, 0.75),
        ([[0.25, 0.75]], [1], None, 0.75),
        ([[math.log(0.25), math.log(0.75)]], [1], nn.NLLLoss(), 0.75),
        ([LOGIT], [1], None, 0.75),
        ([[LOGIT]], [[1.0]], nn.BCEWithLogitsLoss(), 0.75),
        ([0.75], [1.0], nn.BCELoss(), 0.75),
    ],
)
def test_scores_become_probabilities_as_the_loss_means_them(preds, target, loss, p):
    told = seen_of([({"preds": torch.tensor(preds), "target": torch.tensor(target)}, None)], loss=loss)
    assert told["worst"][0]["p"] == pytest.approx(p)
    assert told["counts"] == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    "output",
    [
        {}, {"preds": torch.zeros(2, 3)}, {"preds": "a", "target": "b"},
        {"preds": torch.zeros(0, 3), "target": torch.zeros(0).long()},
        {"preds": torch.zeros(2, 3, 4), "target": torch.zeros(2, 4).long()},
        {"preds": torch.zeros(2, 3), "target": torch.zeros(2)},
        {"preds": torch.zeros(3, 2), "target": torch.zeros(2).long()},
        {"preds": torch.zeros(()), "target": torch.zeros(())},
        {"preds": torch.zeros(1), "target": torch.zeros(1, 1, 1)},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_left_out(output):
    assert seen_of([(output, None)]) == {}


def test_targets_that_are_ignored_are_not_counted():
    told = seen_of([({"preds": torch.eye(3), "target": torch.tensor([0, -100, 7])}, ["a", "b", "c"])])
    assert told["counts"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert [one["text"] for one in told["worst"]] == ["a"]


def test_values_that_are_no_numbers_are_the_worst():
    preds = torch.tensor([[math.nan, 1.0], [5.0, 0.0], [0.0, math.inf]])
    told = seen_of([({"preds": preds, "target": torch.tensor([0, 0, 0])}, None)], keep=3)
    assert {one["n"] for one in told["worst"][:2]} == {0, 2}


def image(pixels: Tensor) -> np.ndarray:
    import io

    import matplotlib.image

    told = seen_of([({"preds": torch.eye(2)[:1], "target": torch.tensor([0])}, [pixels[None]])])["worst"][0]
    return np.rint(matplotlib.image.imread(io.BytesIO(base64.b64decode(told["image"])), format="png") * 255).astype(int)


def test_images_are_kept_as_they_are():
    gray = torch.tensor([[0, 128], [255, 1]], dtype=torch.uint8)
    assert image(gray).tolist() == gray.tolist()
    assert image(gray[None].float() / 255).tolist() == gray.tolist()
    color = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert image(color).tolist() == color.permute(1, 2, 0).tolist()
    assert image(torch.tensor([[-1.0, 1.0], [0.0, 0.0]])).tolist() == [[0, 255], [128, 128]]
    assert image(torch.zeros(1, 500, 300)).shape == (125, 75)


def test_what_is_shown_of_a_batch_can_be_chosen(tmp_path):
    def show(batch: Any) -> list[str]:
        return [f"sample of class {int(label)}" for label in batch[1]]

    run = fitted(tmp_path, lw.Report(show=show))
    assert all(one["text"] == f"sample of class {one['target']}" for one in part(run, "valid")["worst"])


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (lambda batch: ["only one"], "[str]"),
        (lambda batch: batch[0][:2], "float32[2, 5]"),
        (lambda batch: "a text", "str"),
        (lambda batch: {"x": batch[0]}, "{'x': float32[6, 5]}"),
    ],
)
def test_another_number_than_there_are_samples_is_told_once(tmp_path, shown, told):
    says = (
        rf"^lw.Report: show= returned {re.escape(told)}, and the batch has \d samples: return one for each, "
        r"images \[N, C, H, W\] or \[N, H, W\], rows of numbers \[N, D\], or a list of texts$"
    )
    with pytest.warns(lw.LoopwrightWarning, match=says) as caught:
        run = fitted(tmp_path, lw.Report(show=shown, columns=list("abcde")))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    worst = part(run, "valid")["worst"]
    assert worst
    assert not any({"text", "image", "row"} & one.keys() for one in worst)
    with pytest.raises(lw.SettingError, match=r"^lw.report.results: show= returned .*, and the batch has 9 samples"):
        lw.report.results(lw.Supervised(classifier(), nn.CrossEntropyLoss()), [samples(9)], show=shown)


def test_a_show_that_raises_ends_no_training(tmp_path):
    asked = []

    def show(batch: Any) -> Any:
        asked.append(batch)
        return 1 / 0

    says = r"^lw.Report: show= \(.*test_recorder.py:\d+\) failed on a batch: ZeroDivisionError\('division by zero'\)\. "
    with pytest.warns(lw.LoopwrightWarning, match=says) as caught:
        run = fitted(tmp_path, lw.Report(show=show, columns=["x"]))
    assert (len(caught), len(asked), run.status) == (1, 1, "done")
    assert part(run, "valid")["samples"] == 23
    assert "failed on a batch" in (run.folder / "report.html").read_text()
    with pytest.raises(ZeroDivisionError):
        lw.report.results(lw.Supervised(classifier(), nn.CrossEntropyLoss()), [samples(9)], show=show)


def test_a_resume_from_every_step_is_exact_with_a_report(tmp_path):
    def make() -> Experiment:
        net = classifier(dropout=0.2, batch_norm=True)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
        data = lw.Loader(samples(20), batch_size=7, shuffle=True)
        return Experiment(task, data, data, settings={"epochs": 2, "callbacks": [lw.Report()], "name": "net"})

    whole = resumed_at_every_step(make, tmp_path)
    kept = load_file(whole.folder / "report" / "losses.safetensors")["loss"]
    assert kept.tolist() == list(whole.history.losses["loss"])
