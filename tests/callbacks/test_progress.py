from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.callbacks import ProgressBar, display_mode
from loopwright.callbacks.estimate import part_done, planned, time_left
from loopwright.errors import LoopwrightWarning, SettingError
from loopwright.events import Hooks
from loopwright.parallel import Plain, Single
from loopwright.state import Duration, Progress, Run, Stage

CLOCK = r"(\d+\.\d s|\d+:\d\d)"
SPEED = r"[\d,.]+ samples/s"


def data(n=4):
    return [(torch.ones(2, 1) * i, torch.ones(2, 1)) for i in range(n)]


def fit(file, *, epochs=2, valid=None, bar=None, batches=4, stages=None, **settings):
    """Train a net that does not move: its loss is 1 at all times."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.0))
    trainer = lw.Trainer(epochs, folder=None, progress=bar or ProgressBar(file=file), **settings)
    return trainer.fit(task, data(batches), valid, stages=stages)


class Second(Single):
    rank, world_size = 1, 2


class Batches:
    def __init__(self, batches):
        self.batches = batches


def stage(until, batches=10, name="main", **settings):
    return Stage(name, [Duration.parse(u) for u in until], source=Batches(batches), **settings)


def bare(*stages, comm=None, **progress):
    return Run(
        task=None,
        stages=list(stages),
        models={},
        optimizers={},
        callbacks=[],
        hooks=Hooks(),
        comm=comm or Single(),
        precision=Plain(),
        device=torch.device("cpu"),
        progress=Progress(**progress),
    )


# what is shown


def test_a_file_gets_one_plain_line_an_epoch_and_how_it_ended():
    file = io.StringIO()
    fit(file, valid=data(2))
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    for n in (1, 2):
        row = rf"epoch {n}/2  train/loss 1.0000  valid/loss 1.0000  {SPEED}  {CLOCK}"
        assert re.fullmatch(row, lines[n - 1])
    assert re.fullmatch(rf"finished after 2 epochs, 8 steps, {CLOCK}", lines[2])


def test_a_run_that_goes_on_says_from_where(folder):
    task = lw.Supervised(net := nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.0))
    run = lw.Trainer(1, folder=folder, progress=False).fit(task, data())
    for settings, resume, verb in (({"folder": None}, None, "goes on"), ({"folder": folder}, run.folder, "resumed")):
        file = io.StringIO()
        lw.Trainer(2, progress=ProgressBar(file=file), **settings).fit(task, data(), resume=resume)
        first, second, _ = file.getvalue().splitlines()
        assert re.match(rf"{verb} after 1 epoch, 4 steps, {CLOCK}", first)
        assert second.startswith("epoch 2/2")


@pytest.mark.capability("FA-13")
def test_a_terminal_keeps_a_line_of_metrics_an_epoch_and_nothing_else(terminal):
    """Validation metrics are printed each epoch, in a table on the console (or in HTML: see the notebook test)."""
    fit(terminal, epochs=3, valid=data(2))
    assert terminal.refreshes > 4  # bars were drawn meanwhile
    rows = [rf"epoch {n}/3  train/loss 1.0000  valid/loss 1.0000  {SPEED}  {CLOCK}" for n in (1, 2, 3)]
    expected = [*rows, rf"finished after 3 epochs, 12 steps, {CLOCK}"]
    assert len(terminal.screen) == len(expected)
    for line, pattern in zip(terminal.screen, expected, strict=True):
        assert re.fullmatch(pattern, line)


class Refresh(lw.Callback):
    """Makes every step and every batch of validation a refresh, and keeps the screens that were to be seen."""

    def __init__(self, bar):
        self.bar, self.seen = bar, []

    def on_step_start(self, run):
        self.bar.next = 0.0
        self.seen.append(self.bar.file.screen)

    def on_eval_batch_end(self, run, output, batch):
        self.on_step_start(run)


def test_the_bar_stands_below_the_cursor_and_counts_the_batches_of_the_epoch(terminal):
    look = Refresh(ProgressBar(file=terminal))
    fit(terminal, epochs=1, bar=look.bar, callbacks=[look], log_every=1)
    assert [len(screen) for screen in look.seen] == [2, 2, 2, 2]
    assert look.seen[2][0] == ""  # where the cursor stands
    assert re.fullmatch(r"epoch 1/1  ─{30}  0/4", look.seen[0][1])
    assert re.fullmatch(rf"epoch 1/1  ━{{15}}─{{15}}  2/4  train/loss 1.0000  {SPEED}", look.seen[2][1])


def test_what_is_printed_meanwhile_stays_whole_above_the_bar(terminal):
    bar = ProgressBar(file=terminal)

    class Talk(lw.Callback):
        def on_step_start(self, run):
            bar.next = 0.0
            terminal.write(f"before step {run.progress.step + 1}\n")

    fit(terminal, epochs=1, bar=bar, callbacks=[Talk()])
    assert terminal.screen[:4] == [f"before step {n}" for n in (1, 2, 3, 4)]
    assert terminal.screen[4].startswith("epoch 1/1  train/loss")


def test_bars_at_the_bottom_of_the_screen_scroll_it_and_overwrite_nothing(terminal):
    terminal.height = 4
    look = Refresh(ProgressBar(file=terminal))
    fit(terminal, epochs=9, bar=look.bar, callbacks=[look], valid=data(2))
    assert [line[:9] for line in terminal.screen] == [*(f"epoch {n}/9" for n in range(1, 10)), "finished "]


def test_a_line_that_someone_else_has_begun_is_kept(terminal):
    bar = ProgressBar(file=terminal)

    class Dots(lw.Callback):
        def on_step_start(self, run):
            bar.next = 0.0
            terminal.write(".")

    fit(terminal, epochs=1, bar=bar, callbacks=[Dots()])
    assert terminal.screen[0].startswith("....epoch 1/1")


def test_validation_has_its_own_line_and_count(terminal):
    look = Refresh(ProgressBar(file=terminal))
    fit(terminal, epochs=1, bar=look.bar, callbacks=[look], valid=data(3))
    training, validation = look.seen[-1][1:]  # as the third batch of validation ends
    assert training.startswith("epoch 1/1  " + "━" * 30 + "  4/4")
    assert validation == "validation  " + "━" * 20 + "─" * 10 + "  2/3"
    assert not any("validation" in line for line in terminal.screen)


def test_a_validation_within_an_epoch_has_its_own_line():
    file = io.StringIO()
    fit(file, epochs=1, valid=data(2), validate_every="2 steps", log_every="1 step")
    lines = file.getvalue().splitlines()
    for n in (2, 4):
        row = rf"epoch 1/1  step {n}  train/loss 1.0000  valid/loss 1.0000  {CLOCK}"
        assert re.fullmatch(row, lines[n // 2 - 1])
    assert lines[2].startswith("epoch 1/1  train/loss 1.0000")


def test_stages_are_named_and_steps_are_counted_to_their_total():
    file = io.StringIO()
    stages = [lw.Stage("head", until="1 epoch"), lw.Stage("everything", until="2 epochs")]
    fit(file, epochs=None, stages=stages)
    labels = [line.split("  train")[0] for line in file.getvalue().splitlines()[:-1]]
    assert labels == ["head        epoch 1/3", "everything  epoch 2/3", "everything  epoch 3/3"]

    file = io.StringIO()
    fit(file, epochs=None, steps=6, batches=4)
    assert re.fullmatch(r"epoch 2  step 6/6  train/loss 1.0000", file.getvalue().splitlines()[1])


def test_chosen_metrics_are_shown_and_a_missing_one_is_a_dash():
    file = io.StringIO()
    bar = ProgressBar(file=file, metrics=["valid/loss", "valid/f1"])
    with pytest.warns(LoopwrightWarning, match="ProgressBar shows 'valid/f1', which nothing produces"):
        fit(file, epochs=1, bar=bar, valid=data(1))
    assert re.match(r"epoch 1/1  valid/loss 1.0000  valid/f1      -  ", file.getvalue())


@pytest.mark.parametrize("width", [20, 40, 60, 120])
def test_lines_are_never_wider_than_the_terminal(terminal, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    terminal.width = width
    look = Refresh(ProgressBar(file=terminal))
    valid = {"first": data(1), "second": data(1)}
    fit(terminal, bar=look.bar, callbacks=[look], valid=valid, log_every=1)
    assert [line[:9] for line in terminal.screen] == ["epoch 1/2", "epoch 2/2", "finished "]
    assert all(len(line) < width for line in terminal.screen[:2])


def test_an_error_leaves_the_terminal_clean_and_says_so(terminal):
    bar = ProgressBar(file=terminal)

    class Boom(lw.Callback):
        def on_step_end(self, run, result):
            bar.next = 0.0
            if run.progress.step == 3:
                raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fit(terminal, bar=bar, callbacks=[Boom()])
    assert len(terminal.screen) == 1
    assert re.fullmatch(rf"failed \(ValueError\) after 0 epochs, 3 steps, {CLOCK}", terminal.screen[0])


def test_an_interrupt_is_no_failure_and_a_stop_says_why(terminal):
    class Stop(lw.Callback):
        def on_step_end(self, run, result):
            if run.progress.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(terminal, callbacks=[Stop()])
    assert terminal.screen[-1].startswith("interrupted after 0 epochs, 3 steps")

    class Enough(lw.Callback):
        def on_epoch_end(self, run):
            run.request_stop("it is enough")

    fit(terminal, epochs=5, callbacks=[Enough()])
    assert re.fullmatch(rf"stopped after 1 epoch, 4 steps, {CLOCK}: it is enough", terminal.screen[-1])


def test_colours_are_left_out_where_no_color_is_set(terminal, monkeypatch):
    fit(terminal, epochs=1)
    assert "\x1b[32m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    file = type(terminal)()
    fit(file, epochs=1)
    assert not re.search(r"\x1b\[\d+m", file.getvalue())
    assert "─" in file.getvalue()


def test_a_terminal_without_unicode_gets_ascii(terminal):
    type(terminal).encoding, kept = "ascii", type(terminal).encoding
    try:
        fit(terminal, epochs=1)
    finally:
        type(terminal).encoding = kept
    assert terminal.getvalue().isascii()


# when it is shown


def test_epochs_that_take_no_time_are_thinned_but_the_last_is_there():
    file = io.StringIO()
    fit(file, epochs=400, batches=1)
    lines = file.getvalue().splitlines()
    assert 50 <= len(lines) < 400
    assert lines[-2].startswith("epoch 400/400")


@pytest.mark.parametrize(("name", "value"), [("LOOPWRIGHT_PROGRESS", "0"), ("TQDM_DISABLE", "1")])
def test_the_environment_switches_it_off(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    file = io.StringIO()
    fit(file, valid=data(1))
    assert file.getvalue() == ""


def test_only_rank_0_shows_anything():
    file = io.StringIO()
    bar, run = ProgressBar(file=file), bare(stage(["2 epochs"]), comm=Second())
    bar.on_fit_start(run)
    bar.on_epoch_start(run)
    bar.on_step_end(run, None)
    bar.on_fit_end(run)
    assert file.getvalue() == ""


def drive(bar, seconds, steps):
    """A run of one long epoch in which each step takes ``seconds``; where the output stood after each step."""
    run = bare(stage(["1 epoch"], batches=steps), seconds=0.0)
    bar.on_fit_start(run)
    bar.on_epoch_start(run)
    written = [len(bar.file.getvalue())]
    for step in range(1, steps + 1):
        run.progress = Progress(batch=step, step=step, samples=step, seconds=step * seconds)
        bar.on_step_end(run, None)
        written.append(len(bar.file.getvalue()))
    return [step for step, (a, b) in enumerate(pairwise(written), 1) if a != b]


def test_a_log_file_gets_at_most_one_line_every_30_seconds():
    bar = ProgressBar(file=io.StringIO())
    assert drive(bar, 1.0, 100) == [30, 60, 90]
    line = bar.file.getvalue().splitlines()[1]
    assert re.fullmatch(rf"epoch 1/1  60/100  {SPEED}  0:40 left", line)


def test_a_terminal_is_refreshed_at_most_10_times_a_second(terminal):
    refreshed = drive(ProgressBar(file=terminal), 0.03, 100)  # 3 seconds
    assert 20 <= len(refreshed) <= 31
    assert min(b - a for a, b in pairwise(refreshed)) >= 4


def test_showing_progress_changes_no_bit():
    def weights(progress):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.01))
        lw.Trainer(epochs=3, folder=None, progress=progress).fit(task, data(), data(2))
        return [p.detach() for p in net.parameters()]

    shown, hidden = weights(ProgressBar(file=io.StringIO())), weights(False)
    assert all(torch.equal(a, b) for a, b in zip(shown, hidden, strict=True))


# how long it takes


def test_the_time_left_follows_from_what_the_open_stage_has_taken():
    run = bare(stage(["4 epochs"]), epoch=1, batch=5, step=15, stage_step=15, samples=30, seconds=30.0)
    assert part_done(run) == pytest.approx(1.5 / 4)
    assert time_left(run) == pytest.approx(50.0)
    assert planned(run, "epoch") == 4
    assert planned(run, "step") is None


def test_the_first_limit_that_is_reached_counts():
    run = bare(stage(["4 epochs", "40 s", "1000 steps"]), epoch=1, batch=5, step=15, seconds=30.0)
    assert part_done(run) == pytest.approx(0.75)
    assert time_left(run) == pytest.approx(10.0)


def test_later_stages_count_with_the_speed_of_the_open_one():
    epochs = stage(["2 epochs"], batches=5, accumulate=2)
    later = [epochs, stage(["20 steps"]), stage(["10 s"]), stage(["40 samples"])]
    run = bare(stage(["20 steps"]), *later, epoch=1, step=10, samples=20, seconds=20.0)
    assert time_left(run) == pytest.approx(20 + 2 * 3 * 2 + 20 * 2 + 10 + 40)
    assert planned(bare(stage(["2 epochs"]), stage(["1.5 epochs"])), "epoch") == 4


def test_an_unknown_length_gives_no_estimate_before_the_first_epoch_is_over():
    run = bare(stage(["3 epochs"], batches=None), batch=7, step=7, seconds=7.0)
    assert (time_left(run), part_done(run)) == (None, None)
    run.progress = Progress(epoch=1, step=20, seconds=20.0)
    assert time_left(run) == pytest.approx(40.0)
    run = bare(stage(["3 epochs"]), stage(["1 epoch"], batches=None), step=9, epoch=1, seconds=9.0)
    assert time_left(run) is None


def test_a_slow_start_gives_no_estimate_before_the_first_step():
    run = bare(stage(["10 s"]), stage(["5 steps"]), seconds=5.0)
    assert time_left(run) is None


# where it is shown


def test_the_mode_follows_from_the_file(terminal, monkeypatch):
    assert display_mode(terminal) == "terminal"
    assert display_mode(io.StringIO()) == "lines"
    monkeypatch.setenv("TERM", "dumb")
    assert display_mode(terminal) == "lines"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"refresh_s": 0.01}, "refresh_s=0.01: expected 0.1 seconds or more"),
        ({"mode": "terminl"}, "mode='terminl' is unknown. Known: 'auto', 'lines', 'notebook', 'terminal'. "
         "Did you mean 'terminal'?"),
        ({"metrics": "train/loss"}, "metrics='train/loss': expected a list of logged names, such as ['train/loss']"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(arguments, text):
    with pytest.raises(SettingError) as error:
        ProgressBar(**arguments)
    assert str(error.value) == text


NOTEBOOK = """
import torch, loopwright as lw
net = torch.nn.Linear(1, 1)
task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
data = [(torch.ones(2, 1) * i, torch.ones(2, 1)) for i in range(4)]
run = lw.Trainer(epochs=3, folder=None, log_every=2).fit(task, data, data)
"""


@pytest.mark.slow
@pytest.mark.capability("FA-13")
def test_a_notebook_keeps_a_table_and_the_curve_of_the_loss(tmp_path):
    """In a notebook the results are an HTML table, in one output."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell(NOTEBOOK)
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=120).execute(cwd=str(tmp_path))
    (output,) = cell.outputs
    html = output["data"]["text/html"]
    assert re.findall(r"<b>(.*?)</b>", html) == ["", "train/loss", "valid/loss", "speed", "time"]
    assert re.findall(r">(epoch \d/3)<", html) == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "<polyline" in html
    assert "<progress" not in html
    assert re.search(rf"finished after 3 epochs, 12 steps, {CLOCK}", html)
