"""Weights are loaded from a checkpoint whole, or in part by name, and the report says what came of each tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loopwright as lw
from loopwright.checkpoint import write
from loopwright.errors import CheckpointError, SettingError
from tiny import bits, classifier, loader, same, sgd_task, trainer


def net(width: int = 3, *, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    return nn.ModuleDict({"encoder": body, "head": nn.Linear(4, width)})


def saved(module: nn.Module, name: str = "model") -> Path:
    return write(Path("checkpoints/step-00000001"), {name: dict(module.state_dict())}, {}, {})


def test_all_weights_and_buffers_are_loaded_to_the_bit() -> None:
    source = net(seed=1)
    source["encoder"][1].running_mean.add_(3)
    target = net(seed=2)
    report = lw.load_weights(target, saved(source))
    assert same(bits(source)[0], bits(target)[0])
    assert str(report) == "checkpoints/step-00000001: 9 of 9 tensors fit"


def test_a_task_takes_the_weights_that_its_runs_have_saved(folder: Path) -> None:
    def task(seed: int) -> lw.Supervised:
        return sgd_task(classifier(seed=seed), loss=nn.functional.cross_entropy)

    trained, fresh = task(1), task(2)
    run = trainer(epochs=1, folder=folder).fit(trained, loader(8))
    lw.load_weights(fresh, run.folder)
    assert same(bits(fresh.module)[0], bits(trained.module)[0])
    bare = nn.ModuleDict({"module": classifier(seed=3)})
    with pytest.raises(CheckpointError, match=r"What may help: rename=\{'': 'module.'\} gives"):
        lw.load_weights(bare, run.folder)
    lw.load_weights(bare, run.folder, rename={"": "module."})
    assert same(bits(bare["module"])[0], bits(trained.module)[0])


@pytest.mark.capability("B-26")
def test_only_what_a_pattern_names_is_touched() -> None:
    """A part of a model is loaded by a pattern of names."""
    source, target = net(10, seed=1), net(3, seed=2)
    head = bits(target["head"])[0]
    report = lw.load_weights(target, saved(source), only="encoder.*")
    assert same(bits(source["encoder"])[0], bits(target["encoder"])[0])
    assert same(bits(target["head"])[0], head)
    assert (len(report.loaded), report.missing, report.unexpected, report.reshaped) == (7, [], [], [])


def test_another_shape_is_refused_with_the_report_and_nothing_is_loaded() -> None:
    source, target = net(10, seed=1), net(3, seed=2)
    before = bits(target)[0]
    with pytest.raises(CheckpointError) as caught:
        lw.load_weights(target, saved(source))
    assert str(caught.value) == (
        "nothing was loaded. checkpoints/step-00000001: 7 of 9 tensors fit\n"
        "  of another shape: head.weight is float32[10, 4] there and float32[3, 4] here, head.bias is float32[10] "
        "there and float32[3] here\n"
        "What may help: only='encoder.*' names what is wanted, strict=False takes what fits"
    )
    assert same(bits(target)[0], before)


def test_what_fits_is_loaded_when_asked_for() -> None:
    source, target = net(10, seed=1), net(3, seed=2)
    target["more"] = nn.Linear(1, 1)
    report = lw.load_weights(target, saved(source), strict=False)
    assert same(bits(source["encoder"])[0], bits(target["encoder"])[0])
    assert str(report) == (
        "checkpoints/step-00000001: 7 of 11 tensors fit\n"
        "  missing there: more.weight, more.bias\n"
        "  of another shape: head.weight is float32[10, 4] there and float32[3, 4] here, head.bias is float32[10] "
        "there and float32[3] here"
    )


@pytest.mark.capability("B-26")
@pytest.mark.parametrize("rename", [{"encoder.": "0."}, lambda name: name.replace("encoder.", "0.")])
def test_names_are_given_other_beginnings(rename: object) -> None:
    source = net(seed=1)
    target = nn.Sequential(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)))
    report = lw.load_weights(target, saved(source), rename=rename, strict=False)  # type: ignore[arg-type]
    assert same(bits(target[0])[0], bits(source["encoder"])[0])
    assert sorted(report.unexpected) == ["head.bias", "head.weight"]


def test_values_take_the_dtype_of_the_module() -> None:
    source, target = net(seed=1), net(seed=2).to(torch.bfloat16)
    lw.load_weights(target, saved(source))
    assert torch.equal(target["head"].weight, source["head"].weight.bfloat16())
    assert target["head"].weight.dtype == torch.bfloat16


def test_a_safetensors_file_will_do() -> None:
    source, target = net(seed=1), net(seed=2)
    save_file(dict(source.state_dict()), "weights.safetensors")
    lw.load_weights(target, "weights.safetensors")
    assert same(bits(source)[0], bits(target)[0])
    Path("weights.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match=r"weights.safetensors cannot be read as safetensors"):
        lw.load_weights(target, "weights.safetensors")


def test_one_of_several_models_is_named() -> None:
    source = net(seed=1)
    files = {"model.generator": dict(source["encoder"].state_dict()), "model.critic": dict(source["head"].state_dict())}
    path = write(Path("checkpoints/step-00000001"), files, {}, {})
    target = nn.Linear(4, 3)
    lw.load_weights(target, path, model="critic")
    assert same(bits(target)[0], bits(source["head"])[0])
    with pytest.raises(CheckpointError, match=r"model=None is none. Known: 'critic', 'generator'"):
        lw.load_weights(target, path)


def test_nothing_that_fits_is_an_error_also_when_parts_will_do() -> None:
    with pytest.raises(CheckpointError, match=r"What may help: rename=\{'encoder.': 'body.'\} gives"):
        lw.load_weights(nn.ModuleDict({"body": nn.Linear(7, 7)}), saved(net()), strict=False)
    with pytest.raises(SettingError, match=r"the pattern 'body.\*' matches no parameter"):
        lw.load_weights(net(), saved(net()), only="body.*")
