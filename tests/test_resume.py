"""A fit goes on from a checkpoint as the run that was never stopped, or says why it cannot and touches nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import loopwright as lw
from loopwright.errors import CheckpointError, LoopwrightWarning, SettingError
from loopwright.events import HOOKS
from loopwright.legacy import import_legacy
from tiny import acts, bits, classifier, loader, same, samples, seed_all


class Killed(Exception):  # noqa: N818
    pass


def kill(at: int) -> lw.Callback:
    def act(run: lw.Run, result: Any) -> None:
        if run.progress.step == at:
            raise Killed

    return acts(on_step_end=act)


def task(*, width: int | None = None, lr: float = 0.01, seed: int = 1) -> lw.Supervised:
    net = classifier(dropout=0.3, batch_norm=True, seed=seed)
    if width is not None:
        net[-1] = nn.Linear(8, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    metrics = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=schedule, metrics=metrics)


def trainer(at: int = 0, **settings: Any) -> lw.Trainer:
    """3 epochs of 4 steps; killed after step ``at``; a checkpoint every 2 steps."""
    checkpoint = lw.Checkpoint("2 steps", keep=3)
    defaults = {"epochs": 3, "accumulate": 2, "log_every": "3 steps", "name": "a", "checkpoint": checkpoint}
    callbacks = [kill(at), *settings.pop("callbacks", [])]
    return lw.Trainer(**{**defaults, "progress": False, "callbacks": callbacks, **settings})


def fit(user: lw.Trainer, what: lw.Supervised | None = None, *, seed: int = 3, **how: Any) -> lw.Run:
    """As a new process would: other random numbers, other weights, until the checkpoint is loaded."""
    seed_all(seed)
    what = what or task(seed=seed)
    train = loader(37, noisy=True, batch_size=5, shuffle=True)
    return user.fit(what, **{"train": train, "valid": loader(9, batch_size=4), **how})


def killed(at: int = 7, **settings: Any) -> Path:
    """The folder of a run that was killed after step ``at``."""
    with pytest.raises(Killed):
        fit(trainer(at, **settings))
    (folder,) = Path("runs/a").iterdir()
    return folder


def state_of(run: lw.Run) -> list[Any]:
    progress = {k: v for k, v in run.progress._asdict().items() if k != "seconds"}
    return [*bits(run.task, *run.optimizers.values()), progress, run.metrics, run.history.losses["loss"].tolist()]


def records(run: lw.Run) -> list[dict[str, Any]]:
    assert run.folder is not None
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def files(folder: Path = Path("runs")) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------ the same run to the bit


@pytest.mark.capability("IG-09")
@pytest.mark.parametrize("at", [3, 4, 5, 8, 9, 11, 12])
def test_a_killed_run_goes_on_to_the_bits_of_the_run_that_was_never_killed(at: int) -> None:
    """A checkpoint holds all of a run: where it stands, model, optimizer, scheduler, random state, records."""
    whole = fit(trainer(name="whole"))
    folder = killed(at)
    run = fit(trainer(), seed=99, resume="auto")
    assert (run.folder, run.status) == (folder, "done")
    assert run.resumed_from is not None
    assert run.resumed_from.name == f"step-{(at - 1) // 2 * 2:08d}"
    assert all(map(same, state_of(run), state_of(whole)))
    assert records(run) == records(whole)


def test_killed_again_and_again_it_ends_with_the_same_bits() -> None:
    whole = fit(trainer(name="whole"))
    killed(1)  # before its first checkpoint: the next one begins anew
    for at in (3, 4, 9):
        with pytest.raises(Killed):
            fit(trainer(at), seed=at, resume="auto")
    run = fit(trainer(), seed=99, resume="auto")
    assert all(map(same, state_of(run), state_of(whole)))
    assert records(run) == records(whole)


def test_in_a_notebook_the_same_task_goes_on_after_an_error() -> None:
    whole, what = fit(trainer(name="whole")), task(seed=3)
    with pytest.raises(Killed):
        fit(trainer(7), what)
    run = fit(trainer(), what, seed=8, resume="auto")
    assert all(map(same, state_of(run), state_of(whole)))


def test_without_a_seed_our_own_order_is_that_of_the_saved_run_in_every_stage() -> None:
    def stages() -> list[lw.Stage]:
        other = lw.Loader(samples(20), 4, shuffle=True)
        return [lw.Stage("a", until="1 epoch"), lw.Stage("b", until="2 epochs", source=other)]

    def once(user: lw.Trainer, seed: int, **how: Any) -> lw.Run:
        return fit(user, seed=seed, train=lw.Loader(samples(), 5, shuffle=True), stages=stages(), **how)

    whole = once(trainer(epochs=None, name="whole"), 3)
    with pytest.raises(Killed):
        once(trainer(3, epochs=None), 3)  # in the first stage; the order of the second one has no state yet
    run = once(trainer(epochs=None), 4, resume="auto")
    assert all(map(same, state_of(run), state_of(whole)))


def test_what_hooks_do_at_the_start_happens_before_the_checkpoint_is_put_back() -> None:
    def begin(run: lw.Run) -> None:
        torch.rand(3)
        with torch.no_grad():
            run.models["model"][0].weight.mul_(2)

    whole = fit(trainer(name="whole", callbacks=[acts(on_fit_start=begin)]))
    killed(callbacks=[acts(on_fit_start=begin)])
    seen = []
    look = acts(on_fit_start=lambda run: seen.append(run.progress.step))
    run = fit(trainer(callbacks=[acts(on_fit_start=begin), look]), seed=99, resume="auto")
    assert all(map(same, state_of(run), state_of(whole)))
    assert seen == [6]  # a hook can tell that this is no beginning


@pytest.mark.filterwarnings("ignore:the run goes on")  # step has another value of at
def test_a_step_function_goes_on_with_what_it_keeps() -> None:
    def run_until(at: int, resume: str | None) -> list[int]:
        seen: list[int] = []
        faults = [at]

        def step(run: lw.Run, batch: int) -> None:
            if run.progress.step in faults:
                raise Killed
            seen.append(batch)

        state = {"seen": (lambda: list(seen), lambda saved: seen.__setitem__(slice(None), saved))}
        user = lw.Trainer(epochs=2, name="s", progress=False, checkpoint=lw.Checkpoint("2 steps"))
        with suppress(Killed):
            user.run(step, [0, 1, 2, 3, 4], state=state, resume=resume)
        return seen

    assert run_until(7, None) == [0, 1, 2, 3, 4, 0, 1]
    assert run_until(-1, "auto") == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------ the end of a run


def test_a_finished_run_is_left_alone() -> None:
    first = fit(trainer())
    before = files()
    run = fit(trainer(), seed=99, resume="auto")
    assert files() == before
    assert (run.status, run.progress.step, run.folder) == ("done", 12, first.folder)
    assert all(map(same, state_of(run), state_of(first)))


def test_a_run_that_a_callback_has_ended_is_left_alone() -> None:
    def stop(run: lw.Run) -> None:
        if run.progress.epoch == 2:
            run.request_stop("good enough")

    first = fit(trainer(callbacks=[acts(on_epoch_end=stop)]))
    run = fit(trainer(callbacks=[acts(on_epoch_end=stop)]), seed=99, resume="auto")
    assert (first.status, run.progress.step, run.stop_reason) == ("stopped", 8, "good enough")
    assert first.folder is not None
    more = fit(trainer(), seed=99, resume=first.folder)  # asked for by its path, it goes on
    assert more.progress.step == 12


class EMA(lw.Callback):
    """That of docs/recipes/everyday.md: what its state goes into is made in ``on_fit_start``."""

    def on_fit_start(self, run: lw.Run) -> None:
        torch.rand(3)  # what it draws is put back
        self.model = AveragedModel(run.models["model"], multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_step_end(self, run: lw.Run, result: Any) -> None:
        self.model.update_parameters(run.models["model"])

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def test_a_finished_run_gives_its_callbacks_back_as_they_ended() -> None:
    first = fit(trainer(callbacks=[ema := EMA()]))
    seen: list[Any] = []
    again = EMA()
    watches = acts(**{name: lambda run, *_: seen.append(run) for name in HOOKS if name.startswith("on_")})
    run = fit(trainer(callbacks=[again, watches]), seed=99, resume="auto")
    assert same(again.model.state_dict(), ema.model.state_dict())
    assert all(map(same, state_of(run), state_of(first)))
    assert seen == []  # those that remember nothing are not called


def test_more_epochs_go_on_as_one_longer_run() -> None:
    whole = fit(trainer(epochs=5, name="whole"))
    first = fit(trainer())
    run = fit(trainer(epochs=5), seed=99, resume="auto")
    assert (run.progress.epoch, run.folder) == (5, first.folder)
    assert all(map(same, state_of(run), state_of(whole)))


def test_a_stage_that_is_added_comes_after_the_end() -> None:
    stages = [lw.Stage("a", until="2 epochs"), lw.Stage("b", until="1 epoch")]
    whole = fit(trainer(epochs=None, name="whole"), stages=stages)
    fit(trainer(epochs=None), stages=stages[:1])
    run = fit(trainer(epochs=None), seed=99, stages=stages, resume="auto")
    assert run.progress.epoch == 3
    assert all(map(same, state_of(run), state_of(whole)))


# ------------------------------------------------------------------------------------------ which checkpoint


def test_where_there_is_none_training_begins() -> None:
    run = fit(trainer(), resume="auto")
    assert (run.status, run.progress.step, run.resumed_from) == ("done", 12, None)


def spoil(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_named() -> None:
    whole = fit(trainer(name="whole"))
    folder = killed()
    spoil(folder / "checkpoints/step-00000006")
    with pytest.warns(
        LoopwrightWarning, match=r"step-00000006.model.safetensors is damaged.*Going on from .*step-00000004"
    ):
        run = fit(trainer(), seed=99, resume="auto")
    assert all(map(same, state_of(run), state_of(whole)))


def test_a_damaged_manifest_is_named_too() -> None:
    manifest = killed() / "checkpoints/step-00000006/manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"order"', b'"orfer"'))
    with pytest.warns(LoopwrightWarning, match=r"step-00000006.manifest.json.* Going on from .*step-00000004"):
        fit(trainer(), seed=99, resume="auto")


def test_it_does_not_begin_anew_over_damaged_checkpoints() -> None:
    folder = killed()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        spoil(checkpoint)
    before = files()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read:(.|\n)*fit\(\.\.\., resume=None\)"):
        fit(trainer(), resume="auto")
    assert files() == before


def test_the_newest_run_of_the_name_is_meant() -> None:
    fit(trainer())
    fit(trainer(name="other"))
    with pytest.raises(Killed):
        fit(trainer(1))
    run = fit(trainer(), resume="auto")  # the killed one is newer than the finished one, and has no checkpoint
    assert run.resumed_from is None
    assert len(list(Path("runs/a").iterdir())) == 3


@pytest.mark.parametrize("what", ["{}", "{}/checkpoints", "{}/checkpoints/step-00000006"])
def test_a_path_names_a_run_or_a_checkpoint(what: str) -> None:
    whole = fit(trainer(name="whole"))
    folder = killed()
    run = fit(trainer(name="another name"), seed=99, resume=what.format(folder))
    assert run.folder == folder
    assert all(map(same, state_of(run), state_of(whole)))


def test_from_an_older_checkpoint_a_new_folder_is_begun_and_nothing_is_cut() -> None:
    first = fit(trainer())
    assert first.folder is not None
    before = files(first.folder)
    older = first.folder / "checkpoints/step-00000008"
    run = fit(trainer(), seed=99, resume=older)
    assert files(first.folder) == before
    assert run.folder not in (None, first.folder)
    assert all(map(same, state_of(run), state_of(first)))
    assert [r["step"] for r in records(run)] == [
        8,
        8,
        9,
        12,
        12,
        12,
    ]  # the checkpoint was there before the epoch had been closed


def test_without_a_folder_a_path_can_be_gone_on_from() -> None:
    whole = fit(trainer(name="whole"))
    folder = killed()
    before = files()
    run = fit(trainer(folder=None, checkpoint=False, name=None), seed=99, resume=folder)
    assert all(map(same, state_of(run), state_of(whole)))
    assert run.folder is None
    assert files() == before


# ------------------------------------------------------------------------------------------ weights alone


def test_weights_alone_begin_a_new_run() -> None:
    first = fit(trainer())
    begun: list[Any] = []
    look = acts(on_epoch_start=lambda run: begun.append(bits(run.task)[0]) if not begun else None)
    run = fit(trainer(callbacks=[look]), seed=99, resume="weights")
    assert same(begun[0], bits(first.task)[0])
    assert run.folder not in (None, first.folder)
    assert run.progress.step == 12
    assert run.optimizers["main"].param_groups[0]["lr"] == 0.01 / 2


# ------------------------------------------------------------------------------------------ refusals


def refusal(error: type[Exception], user: lw.Trainer, what: lw.Supervised | None = None, **how: Any) -> str:
    """The text of a refused resume, which has touched nothing."""
    before = files()
    what = what or task(seed=5)
    model = bits(what, what.optimizer)[:2]
    with pytest.raises(error) as caught:
        fit(user, what, seed=99, **{"resume": "auto", **how})
    assert files() == before
    assert same(bits(what, what.optimizer)[:2], model)
    return str(caught.value)


def test_another_model_is_refused_before_anything_is_touched() -> None:
    killed()
    text = refusal(CheckpointError, trainer(), task(width=4))
    assert "step-00000006 does not fit this run, and nothing was loaded:" in text
    assert "6.weight is " in text or "4.weight is " in text


@pytest.mark.parametrize(
    ("settings", "what", "how", "says"),
    [
        ({"accumulate": 4}, {}, {}, "stages/main/accumulate was 2 and is 4"),
        ({"clip_norm": 1.0}, {}, {}, "stages/main/phases/main/clip_norm was None and is 1.0"),
        ({"nonfinite": "skip"}, {}, {}, "nonfinite was 'raise' and is 'skip'"),
        ({"seed": 7}, {}, {}, "seed was None and is 7"),
        ({}, {"lr": 0.5}, {}, "optimizers/main/lr was 0.01 and is 0.5"),
        ({}, {}, {"train": loader(38, noisy=True, batch_size=5, shuffle=True)}, "length was 37 and is 38"),
        ({}, {}, {"train": loader(37, noisy=True, batch_size=7, shuffle=True)}, "batch"),
    ],
)
def test_what_would_change_the_bits_is_refused_unless_approximate_is_said(
    settings: dict[str, Any], what: dict[str, Any], how: dict[str, Any], says: str
) -> None:
    folder = killed()
    text = refusal(CheckpointError, trainer(**settings), task(**what), **how)
    assert "step-00000006 cannot be resumed with the same bits:\n  - " in text
    assert says in text
    assert text.endswith(
        "\nMend that; or begin another run, resume=None, also from these weights, resume='weights'; or go on all the "
        "same: fit(..., resume='approximate')"
    )
    run = fit(trainer(**settings), task(**what), seed=99, **how, resume="approximate")
    assert (run.folder, run.status, run.progress.epoch) == (folder, "done", 3)


def test_a_run_that_cannot_be_exact_says_so_when_it_is_resumed() -> None:
    def batches() -> Any:
        return iter([(x, y) for x, y in loader(40, batch_size=2)])

    with pytest.raises(Killed):
        fit(trainer(7, epochs=1), train=batches())
    text = refusal(CheckpointError, trainer(epochs=1), train=batches())
    reasons = re.findall(r"\n  - (.*)", text)
    assert len(reasons) == 1
    run = fit(trainer(epochs=1), train=batches(), resume="approximate")
    assert run.status == "done"


def test_other_hardware_is_a_reason() -> None:
    folder = killed()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        text = refusal(CheckpointError, trainer(), resume=folder)
    finally:
        torch.set_num_threads(threads)
    assert f"threads was {threads} and is {threads + 1}" in text
    assert re.search(r"fit\(\.\.\., resume=lw.Resume\('.*', how='approximate'\)\)$", text)


def test_a_run_that_another_process_trains_is_left_to_it() -> None:
    folder = killed()
    code = f"from loopwright.folder import hold; lock = hold({str(folder)!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        assert f"{folder} is in use: process " in refusal(SettingError, trainer())
        other.stdin.close()
    assert fit(trainer(), seed=99, resume="auto").status == "done"


def test_a_step_function_that_keeps_something_unnamed_is_not_gone_on_with() -> None:
    user = lw.Trainer(epochs=1, name="s", progress=False)
    run = user.run(lambda run, batch: None, [1, 2])
    assert run.exact == [
        "state= was not given, so that a checkpoint holds nothing of what the step function changes: name it, "
        'trainer.run(step, data, state={"net": net, "opt": opt}), or say that there is nothing, state={}'
    ]
    with pytest.raises(CheckpointError, match=r"state= was not given"):
        lw.Trainer(epochs=2, name="s", progress=False).run(lambda run, batch: None, [1, 2], resume="auto")
    with pytest.raises(SettingError, match=r"resume=True: expected 'auto', a path or None, such as resume='auto'"):
        user.run(lambda run, batch: None, [1, 2], resume=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "near"), [("Auto", "auto"), ("atuo", "auto"), ("approx", "approximate"), ("weight", "weights")]
)
def test_a_word_that_is_none_is_told_the_nearest(word: str, near: str) -> None:
    with pytest.raises(SettingError) as error:
        fit(trainer(), resume=word)
    assert str(error.value) == (
        f"resume={word!r} is no path, and no known word. Known: 'approximate', 'auto', 'weights'. "
        f"Did you mean {near!r}?"
    )


def test_imported_weights_are_begun_with_and_not_gone_on_from() -> None:
    net = classifier(dropout=0.3, batch_norm=True, seed=7)
    torch.save(net.state_dict(), "foreign.pt")
    path = import_legacy("foreign.pt", "imported/step-00000000")
    with pytest.raises(CheckpointError, match=r"holds weights and nothing to go on with. Begin with them: fit\("):
        fit(trainer(), resume=path)
    begun: list[Any] = []
    look = acts(on_epoch_start=lambda run: begun.append(bits(run.models["model"])[0]) if not begun else None)
    fit(trainer(callbacks=[look]), resume=lw.Resume(path, how="weights"))
    assert same(begun[0], bits(net)[0])


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(
        SettingError, match=r"resume='auto' needs the folder of the run: leave folder=None out, or give a path"
    ):
        fit(trainer(folder=None, checkpoint=False), resume="auto")
    with pytest.raises(SettingError, match=r"Resume\(how='exactly'\) is unknown. Known: .* Did you mean 'exact'\?"):
        lw.Resume(how="exactly")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"nowhere is not a checkpoint: it does not exist"):
        fit(trainer(), resume="nowhere")
    Path("w.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"^w\.pt is a file, .*: loopwright import-legacy w\.pt w-checkpoint$"):
        fit(trainer(), resume="w.pt")


# ------------------------------------------------------------------------------------------ other places, other data


def test_a_run_without_a_folder_goes_on_from_where_its_checkpoints_are() -> None:
    whole = fit(trainer(name="whole"))
    remote = {"folder": None, "name": None}
    with pytest.raises(Killed):
        fit(trainer(7, **remote, checkpoint=lw.Checkpoint("2 steps", folder="memory://bucket/resume")), resume="auto")
    user = trainer(**remote, checkpoint=lw.Checkpoint("2 steps", folder="memory://bucket/resume"))
    run = fit(user, seed=99, resume="auto")
    assert str(run.resumed_from).endswith("bucket/resume/step-00000006")
    assert all(map(same, state_of(run), state_of(whole)))
    again = fit(trainer(epochs=4, folder=None, checkpoint=False), seed=98, resume="memory://bucket/resume")
    assert again.progress.epoch == 4


def test_what_was_written_in_the_background_is_gone_on_from() -> None:
    whole = fit(trainer(name="whole"))
    killed(checkpoint=lw.Checkpoint("2 steps", async_save=True))
    run = fit(trainer(checkpoint=lw.Checkpoint("2 steps", async_save=True)), seed=99, resume="auto")
    assert run.resumed_from.name == "step-00000006"  # the error has waited for it
    assert all(map(same, state_of(run), state_of(whole)))


def test_other_values_of_the_same_shape_are_refused() -> None:
    def data(add: float) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = samples()
        return x + add, y

    def once(user: lw.Trainer, add: float, **how: Any) -> lw.Run:
        return fit(user, train=lw.Loader(data(add), 5, shuffle=True, seed=1), **how)

    with pytest.raises(Killed):
        once(trainer(7), 0.0)
    with pytest.raises(CheckpointError, match=r"the training data has other values than when the checkpoint was writ"):
        once(trainer(), 0.5, resume="auto")
    assert once(trainer(), 0.0, resume="auto").status == "done"


# ------------------------------------------------------------------------------------------ the best weights


def test_the_best_weights_are_put_back_when_asked_for_also_into_a_run_that_had_ended() -> None:
    def once(restore: str | None, **how: Any) -> tuple[lw.Run, list[Any]]:
        at: list[Any] = []
        keep = acts(on_validation_end=lambda run, values: at.append((values["valid/loss"], bits(run.task)[0])))
        best = lw.Checkpoint("1 epoch", monitor="valid/loss", restore=restore)
        return fit(trainer(checkpoint=best, callbacks=[keep], epochs=6, name=str(restore)), **how), at

    run, at = once("best")
    values = [value for value, _ in at]
    assert values.index(min(values)) < 5  # the last epoch is not the best, so that something is put back
    best = at[values.index(min(values))][1]
    assert same(bits(run.task)[0], best)
    last, _ = once(None)
    assert same(bits(last.task)[0], at[-1][1])
    assert same(bits(once("best", seed=99, resume="auto")[0].task)[0], best)
    with pytest.raises(
        SettingError, match=r"restore='best': expected None, or 'best' together with a value to judge by"
    ):
        lw.Checkpoint(restore="best")
