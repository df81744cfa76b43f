"""What Watch logs, when, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.checkpoint import list_checkpoints
from tiny import classifier, line, loader, pairs, seed_all, sgd_task, trainer


class Records:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        if kind == "train":
            self.seen.append((progress.step, {k: v for k, v in values.items() if k not in ("train/loss", "lr")}))


def watched(*what: str, at: Any = None, **settings: Any) -> list[tuple[int, dict[str, float]]]:
    records = Records()
    callbacks = [lw.Watch(*what, at=at)]
    user = trainer(**{"epochs": 1, "log_every": 1, "callbacks": callbacks, "loggers": [records], **settings})
    user.fit(sgd_task(line(2.0), lr=0.5), pairs([1.0], [2.0], [3.0], [4.0]))
    return records.seen


def test_norms_are_those_of_the_event_and_stand_in_the_next_record() -> None:
    seen = watched("parameters", "gradients", at=lw.Event.STEP_END(every=2))
    assert [step for step, values in seen if values] == [3, 4]  # what is logged after the last record is in one more
    assert seen[2][1] == {"train/parameter_norm/weight": pytest.approx(0.5), "train/gradient_norm/weight": 2.0}
    assert seen[-1] == (4, {"train/parameter_norm/weight": pytest.approx(3.0), "train/gradient_norm/weight": 4.0})


@pytest.mark.parametrize(
    ("at", "steps"),
    [
        (lw.Event.GRADS_READY(once=3), [3]),
        (lw.Event.EPOCH_END, [2]),
        (lw.Event.STEP_END(once=1) | lw.Event.FIT_END, [2, 4]),
        (lw.Event.STEP_END(after=2, when=lambda run: run.progress.step != 3), [4]),
    ],
)
def test_any_event_filter_says_when(at: Any, steps: list[int]) -> None:
    data = pairs([1.0], [2.0])
    records = Records()
    user = trainer(epochs=2, log_every=1, callbacks=[lw.Watch("gradients", at=at)], loggers=[records])
    looks: list[int] = []
    user.on(at)(lambda run: looks.append(run.progress.step))
    user.fit(sgd_task(line()), data)
    assert looks
    logged = [step for step, values in records.seen if values]
    assert len(logged) >= min(1, len([n for n in looks if n < 4]))
    assert logged == [step for step in logged if step in (*steps, *(n + 1 for n in looks), 4)]


def test_activations_are_those_of_the_next_forward_and_no_hook_stays() -> None:
    net, records = classifier(), Records()
    outputs: list[torch.Tensor] = []
    net[0].register_forward_hook(lambda module, args, out: outputs.append(out.detach()) if module.training else None)
    user = trainer(
        epochs=1, log_every=1, loggers=[records], callbacks=[lw.Watch("activations", at=lw.Event.STEP_END(once=2))]
    )
    user.fit(sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss()), loader(20, batch_size=5))
    ((step, values),) = [(step, values) for step, values in records.seen if values]
    assert step == 3
    assert values["train/activation_mean/0"] == pytest.approx(float(outputs[2].mean()))
    assert values["train/activation_std/0"] == pytest.approx(float(outputs[2].std(correction=0)))
    assert {name.rpartition("/")[2] for name in values} == {"0", "1", "2"}
    assert [len(module._forward_hooks) for module in net] == [1, 0, 0]


def test_hooks_go_when_a_run_fails() -> None:
    net = classifier()
    user = trainer(epochs=1, callbacks=[lw.Watch("activations", at=lw.Event.STEP_END)])

    def fail(run: lw.Run) -> None:
        raise RuntimeError("stop")

    user.on(lw.Event.STEP_END(once=2))(fail)
    with pytest.raises(RuntimeError, match="stop"):
        user.fit(sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss()), loader(20, batch_size=5))
    assert not any(module._forward_hooks for module in net)


def test_every_number_of_an_optimizer_is_logged() -> None:
    net, records = classifier(), Records()
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(groups, lr=0.2, weight_decay=0.5))
    user = trainer(epochs=1, log_every=1, loggers=[records], callbacks=[lw.Watch("optimizer", at=lw.Event.STEP_END)])
    user.fit(task, loader(10, batch_size=5))
    values = records.seen[-1][1]
    assert values["train/optimizer/lr/0"] == 0.1
    assert values["train/optimizer/lr/1"] == 0.2
    assert values["train/optimizer/weight_decay/1"] == 0.5
    assert values["train/optimizer/betas.1/0"] == 0.999


def test_what_cannot_be_watched_is_refused_before_step_0() -> None:
    with pytest.raises(lw.SettingError) as error:
        lw.Watch("gradient")
    assert str(error.value) == (
        "Watch('gradient'): there is nothing of that name to watch. Known: 'activations', 'gpu', 'gradients', "
        "'optimizer', 'parameters'. Did you mean 'gradients'?"
    )
    with pytest.raises(lw.SettingError, match="is not an event"):
        lw.Watch("gradients", at="STEP_END")  # type: ignore[arg-type]
    stage = lw.Stage("one", until="1 epoch", callbacks=[lw.Watch("gradients")])
    with pytest.raises(lw.SettingError, match="Watch belongs among the callbacks of the Trainer, not of a stage"):
        trainer().fit(sgd_task(line()), pairs([1.0]), stages=[stage])
    with pytest.raises(lw.SettingError, match=r"Watch\('gpu'\) looks at CUDA, and this run is on cpu; leave 'gpu' out"):
        trainer(epochs=1, callbacks=[lw.Watch("gpu")], device="cpu").fit(sgd_task(line()), pairs([1.0]))


def test_two_watches_look_at_their_own_events_and_a_second_fit_watches_again() -> None:
    records = Records()
    often = lw.Watch("gradients", at=lw.Event.STEP_END(every=2))
    once = lw.Watch("parameters", at=lw.Event.STEP_END(once=2))
    user = trainer(epochs=1, log_every=1, callbacks=[often, once], loggers=[records])
    for _ in range(2):
        records.seen.clear()
        user.fit(sgd_task(line()), pairs([1.0], [2.0], [3.0], [4.0]))
        names = [sorted(values) for _, values in records.seen]
        assert names[2] == ["train/gradient_norm/weight", "train/parameter_norm/weight"]
        assert names[-1] == ["train/gradient_norm/weight"]


@pytest.mark.gpu
def test_memory_and_utilisation_of_the_gpu_are_logged() -> None:
    pytest.importorskip("pynvml", reason='needs nvidia-ml-py: pip install "loopwright[gpu]"')
    values = watched("gpu", at=lw.Event.STEP_END(every=2), device="cuda")[-1][1]
    assert 0 < values["train/gpu_memory_mb"] <= values["train/gpu_memory_peak_mb"]
    assert 0 <= values["train/gpu_utilization"] <= 100


def test_what_is_waited_for_is_in_the_record_of_a_resumed_run(folder: Path) -> None:
    """The output after the event comes after the checkpoint; a step whose record lacks it would be another run."""

    def make() -> Experiment:
        data, task = loader(14, batch_size=4), sgd_task(classifier(dropout=0.1), loss=nn.CrossEntropyLoss())
        watch = lw.Watch("activations", at=lw.Event.STEP_END(every=2))
        return Experiment(task, data, settings={"epochs": 2, "callbacks": [watch]})

    def told(run: lw.Run, after: int) -> list[Any]:
        assert run.folder is not None
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        kept = [d for d in lines if d["kind"] == "train" and d["step"] > after]
        return [{k: v for k, v in d.items() if "activation" in k or k == "step"} for d in kept]

    whole = resumed_at_every_step(make, folder)
    assert whole.folder is not None
    assert [len(one) > 1 for one in told(whole, 0)] == [False, False, True, False, True, False, True, False]
    for place in list_checkpoints(whole.folder / "checkpoints"):
        step = int(place.name[-8:])
        seed_all(step)
        run = make().run(folder / "again", resume=lw.Resume(place))
        assert told(run, step) == told(whole, step)
    assert not any(m._forward_hooks for m in run.models["model"].modules())
