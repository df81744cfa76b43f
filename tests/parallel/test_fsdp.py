"""Parameters shared out over ranks: the same numbers, checkpoints in pieces, and a plain model afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cases_of_ranks
import cases_of_shards
import loopwright as lw
import ranked
from loopwright.checkpoint import list_checkpoints, read, verify
from loopwright.checkpoint.pieces import joined, plan
from loopwright.data import Cut
from loopwright.parallel import region
from loopwright.parallel.spread import Spread

Run = Callable[..., Any]
# world and strategy, and what is asked of them, in this order: some go on from the checkpoints of others
JOBS = {
    "alone-1": ["whole_run", "twice", "used_afterwards", "nonfinite", "best_put_back", "averages_left_in_the_model"],
    "fsdp-2": ["with_dropout", "whole_run", "twice", "used_afterwards", "nonfinite", "best_put_back",
               "best_average_put_back", "averages_left_in_the_model",
               "kept_shared_out", "mistakes", "cannot_write", "in_bfloat16"],
    "fsdp-2 again": ["with_dropout_resumed", "resumed_from_alone"],
    "alone-1 again": ["resumed_from_fsdp_2", "refused"],
    "fsdp-3": ["resumed_from_fsdp_2", "resumed_from_alone", "kept_shared_out", "nonfinite"],
    "ddp-2": ["resumed_from_fsdp_2"],
    "fsdp-4": ["whole_run", "with_dropout"],
    "ddp-4": ["whole_run", "with_dropout", "resumed_from_fsdp_4"],
    "fsdp-4 again": ["with_dropout_resumed", "resumed_from_ddp_4"],
    "ddp-4 again": ["with_dropout_resumed"],
    "ddp-2 again": ["second_from_fsdp_4"],
    "fsdp-2 once more": ["second_from_ddp_4"],
    "alone-1 once more": ["last_from_fsdp_4", "last_from_ddp_4"],
}  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shards"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, name: str, strategy: str, world: int, script: Any, *args: str) -> None:
    """Run a script with so many ranks; several test processes share one run."""
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = folder / f"{name}.done"
        if done.exists():
            assert not done.read_text(), done.read_text()
            return
        launcher = [ranked.__file__, str(world)] if world > 1 else []
        command = [sys.executable, *launcher, script.__file__, *args]
        given = {} if strategy == "alone" else {"STRATEGY": strategy}
        environ = os.environ | {"OMP_NUM_THREADS": "1"} | given
        found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
        done.write_text(found.stderr[-4000:] if found.returncode else "")
        assert found.returncode == 0, found.stderr[-4000:]


@pytest.fixture
def result(place: Path) -> Run:
    """What a command gave: ``result("whole_run", "fsdp-2")``."""

    def get(command: str, job: str) -> Any:
        for name, commands in JOBS.items():
            strategy, world = name.split()[0].split("-")
            once(place, name, strategy, int(world), cases_of_shards, str(place), *commands)
            if command in commands and name.split()[0] == job:
                break
        return json.loads((place / f"{command}-{job}.json").read_text())

    return get


def apart(a: Any, b: Any) -> float:
    """The largest difference of two nested lists of numbers."""
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((apart(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, (int, float)) and not isinstance(a, bool):
        return abs(a - b)
    assert a == b
    return 0.0


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.slow
@pytest.mark.capability("B-04")
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", [name for name in cases_of_ranks.CASES if name not in cases_of_ranks.WHOLE])
def test_the_numbers_are_those_of_one_process(name: str, world: int, place: Path) -> None:
    alone, ranks = place / "cases-1.json", place / f"cases-{world}.json"
    once(place, "cases-alone", "alone", 1, cases_of_ranks, str(alone))
    once(place, f"cases-{world}", "fsdp", world, cases_of_ranks, str(ranks))
    assert apart(json.loads(ranks.read_text())[name], json.loads(alone.read_text())[name]) <= 1e-6


@pytest.mark.slow
@pytest.mark.nightly
def test_a_model_with_tied_and_uneven_parameters_ends_with_the_weights_and_the_optimizer_of_one_process(
    result: Run,
) -> None:
    alone, shared = result("whole_run", "alone-1"), result("whole_run", "fsdp-2")
    for name in ("tensors", "losses", "valid", "average", "ema"):
        assert apart(shared[name], alone[name]) <= 1e-6
    assert sorted(i for rank in shared["reads"] for i in rank) == sorted(alone["reads"][0])


@pytest.mark.slow
@pytest.mark.nightly
def test_the_same_task_again_goes_on_with_the_optimizer_that_it_had(result: Run) -> None:
    assert apart(result("twice", "fsdp-2")["tensors"], result("twice", "alone-1")["tensors"]) <= 1e-6


@pytest.mark.slow
def test_bfloat16_is_for_computing_only_also_in_a_block_that_was_frozen_first(result: Run) -> None:
    found = result("in_bfloat16", "fsdp-2")
    assert found["gradients"] == ["torch.float32"]
    assert 1e-6 < apart(found["bf16"], found["fp32"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp-2", pytest.param("fsdp-3", marks=pytest.mark.nightly)])
def test_a_gradient_that_is_not_finite_in_the_rows_of_one_rank_is_known_to_all(result: Run, job: str) -> None:
    alone, shared = result("nonfinite", "alone-1"), result("nonfinite", job)
    assert shared["raised"].startswith("NonFiniteError: phase 'main' has a loss of")
    assert apart(shared["tensors"], alone["tensors"]) <= 1e-6  # that step was left out by all


# ------------------------------------------------------------------------------------------------ afterwards


@pytest.mark.slow
def test_the_model_comes_out_as_it_went_in(result: Run) -> None:
    """The same parameters, whole, and no hook or attribute is left; predictions are those of the plain module."""
    found, alone = result("used_afterwards", "fsdp-2"), result("used_afterwards", "alone-1")
    assert found["same"]
    assert (found["hooks"], found["left"]) == (0, [])
    assert apart(found["predicted"], found["by hand"]) <= 1e-6  # in batches, and in one go
    assert apart(found["predicted"], alone["predicted"]) <= 1e-6
    run = result("whole_run", "fsdp-2")
    assert run["plain"]
    assert run["tied"]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp-2", pytest.param("fsdp-3", marks=pytest.mark.nightly)])
def test_with_gather_false_the_model_stays_in_parts_and_can_be_used_so(result: Run, job: str) -> None:
    found = result("kept_shared_out", job)
    assert found["parts"]
    assert found["valid"] == pytest.approx(result("kept_shared_out", "fsdp-2")["valid"], abs=1e-6)
    assert found["step"] == 5
    assert found["plain"]  # another fit gathers it


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["fsdp-2", *(pytest.param(f"{n}-4", marks=pytest.mark.nightly) for n in ("fsdp", "ddp"))]
)
def test_a_resume_with_as_many_ranks_gives_the_same_bits(result: Run, job: str) -> None:
    whole, again = result("with_dropout", job), result("with_dropout_resumed", job)
    assert again["tensors"] == whole["tensors"]
    assert again["valid"] == whole["valid"]
    assert again["history"] == whole["history"]
    assert again["average"] == whole["average"]  # of a callback
    assert again["ema"] == whole["ema"]
    assert again["losses"] == {step: whole["losses"][step] for step in again["losses"]}
    assert len(again["losses"]) == cases_of_shards.STEPS - 2 * cases_of_shards.EVERY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "job"),
    [
        ("resumed_from_fsdp_2", "alone-1"),
        pytest.param("resumed_from_fsdp_2", "fsdp-3", marks=pytest.mark.nightly),
        pytest.param("resumed_from_fsdp_2", "ddp-2", marks=pytest.mark.nightly),
        ("resumed_from_alone", "fsdp-2"),
        pytest.param("resumed_from_alone", "fsdp-3", marks=pytest.mark.nightly),
        pytest.param("resumed_from_fsdp_4", "ddp-4", marks=pytest.mark.nightly),
        pytest.param("resumed_from_ddp_4", "fsdp-4", marks=pytest.mark.nightly),
    ],
)
def test_a_resume_with_other_ranks_goes_on_with_the_same_samples_and_losses(
    result: Run, command: str, job: str
) -> None:
    found, whole = result(command, job), result("whole_run", "alone-1")
    assert apart(found["losses"], {step: whole["losses"][step] for step in found["losses"]}) <= 1e-5
    assert apart(found["tensors"], whole["tensors"]) <= 1e-5
    assert apart(found["average"], whole["average"]) <= 1e-5
    assert apart(found["ema"], whole["ema"]) <= 1e-5
    assert len(found["history"]) == cases_of_shards.STEPS
    assert apart(found["history"], whole["history"]) <= 1e-5
    reads = [i for rank in found["reads"] for i in rank]
    assert sorted(reads) == sorted(whole["reads"][0][-len(reads) :])
    assert len(reads) == 70  # 6 steps: one epoch


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("of", "then"), [("fsdp_4", "ddp-2"), ("ddp_4", "fsdp-2")])
def test_four_ranks_then_two_of_the_other_strategy_then_one_train_on_the_samples_and_losses_of_one_run(
    result: Run, of: str, then: str
) -> None:
    whole, every = result("whole_run", "alone-1"), cases_of_shards.EVERY
    parts = [
        result("whole_run", of.replace("_", "-")),
        result(f"second_from_{of}", then),
        result(f"last_from_{of}", "alone-1"),
    ]
    ends = [sum(10 if n % 6 == 5 else 12 for n in range(step)) for step in (0, every, 2 * every, cases_of_shards.STEPS)]
    assert [len(part["losses"]) for part in parts] == [20, 7, 6]
    for number, part in enumerate(parts):
        assert apart(part["losses"], {step: whole["losses"][step] for step in part["losses"]}) <= 1e-5
        reads = sorted(i for rank in part["reads"] for i in rank)
        of_one = whole["reads"][0]
        assert reads == sorted(of_one if number == 0 else of_one[ends[number] : ends[number + 1]])
    assert apart(parts[-1]["tensors"], whole["tensors"]) <= 1e-5
    assert apart(parts[-1]["average"], whole["average"]) <= 1e-5
    assert apart(parts[-1]["ema"], whole["ema"]) <= 1e-5


@pytest.mark.slow
def test_a_resume_with_other_ranks_is_refused_as_inexact(result: Run) -> None:
    told = result("refused", "alone-1")
    assert "cannot be resumed with the same bits:\n  - ranks was 2 and is 1\n  - parameters shared out was True" in told


@pytest.mark.slow
def test_the_best_weights_are_put_back(result: Run) -> None:
    found = result("best_put_back", "fsdp-2")
    assert found["best"] == pytest.approx(found["told"], abs=1e-6)
    assert found["told"] == pytest.approx(result("best_put_back", "alone-1")["told"], abs=1e-6)
    averaged = result("best_average_put_back", "fsdp-2")  # those that the validation saw
    assert averaged["best"] == pytest.approx(averaged["told"], abs=1e-6) != pytest.approx(found["best"], abs=1e-6)


@pytest.mark.slow
def test_averages_that_were_left_in_the_model_give_way_to_the_weights_of_the_training(result: Run) -> None:
    shared, alone = (result("averages_left_in_the_model", job) for job in ("fsdp-2", "alone-1"))
    assert apart(shared, alone) <= 1e-6
    for found in (shared, alone):
        assert found["found"][-1] == found["average"]  # of applied(), and of the average itself
        assert found["found"][0] != found["found"][1] != found["found"][2]


@pytest.fixture
def written(result: Run, place: Path) -> Path:
    """A checkpoint of two ranks, and the last one of its run."""
    return list_checkpoints(Path(result("whole_run", "fsdp-2")["folder"]) / "checkpoints")[-1]


@pytest.mark.slow
def test_a_checkpoint_in_pieces_is_read_by_one_process_and_by_torch(result: Run, written: Path) -> None:
    assert not list(written.glob(".metadata"))
    assert sorted(p.name for p in written.iterdir()) == [
        "manifest.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors",
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "optimizer.safetensors",
        "state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    verify(written)
    module = cases_of_shards.Net(0.0)
    report = lw.load_weights(module, written)
    assert [report.missing, report.unexpected, report.reshaped] == [[], [], []]
    expected = result("whole_run", "fsdp-2")["tensors"]
    assert [t.double().flatten().tolist() for t in module.state_dict().values()] == expected[: len(module.state_dict())]
    with safe_open(written / "model-00002-of-00002.safetensors", framework="pt") as file:
        assert file.get_slice("inp.weight").get_shape() == [3, 5]  # of 7 rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_pieces_of_a_model(written: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    for file in written.glob("model*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    theirs = {k: v for k, v in cases_of_shards.Net(0.0).state_dict().items() if k != "again.weight"}  # stored once
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    ours = read(written).files["model"]
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_a_damaged_piece_is_named(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000020"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    bad = copy / "optimizer-00002-of-00002.safetensors"
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    with pytest.raises(lw.CheckpointError, match=r"optimizer-00002-of-00002\.safetensors is damaged: its blake2b is"):
        read(copy)
    bad.unlink()
    with pytest.raises(lw.CheckpointError, match=r"optimizer-00002-of-00002\.safetensors cannot be read"):
        read(copy)


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_named_by_all_and_leaves_nothing(result: Run) -> None:
    found = result("cannot_write", "fsdp-2")
    assert [told.split(":")[0] for told in found["told"]] == ["CheckpointError", "CheckpointError"]
    assert all("rank 1 could not write its part of" in told and "File too large" in told for told in found["told"])
    assert found["before"] == found["after"]


@pytest.mark.slow
def test_mistakes_are_errors_that_say_what_to_type(result: Run) -> None:
    found = result("mistakes", "fsdp-2")
    assert found["instance"] == (
        "SettingError: the optimizer 'main' was made before FSDP shared out the parameters. Give a function that makes "
        "it: optimizer=lambda params: torch.optim.SGD(params, lr=0.1), or make it in configure_optimizers of an lw.Task"
    )
    assert found["pattern"].startswith("SettingError: FSDP(blocks='layer.*') matches no module. Known: 'again'")
    assert found["class"].startswith("SettingError: FSDP(blocks=TransformerEncoderLayer) matches no module. Known:")
    assert found["offload"].startswith("SettingError: FSDP(offload=True) moves parameters to the CPU, where this run")
    assert found["async"].startswith("SettingError: Checkpoint(async_save=True) cannot be used with FSDP")
    assert found["on the task"].startswith("SettingError: the parameter 'scale' lies on OnTask itself")
    assert found["replaced"].startswith("SettingError: model has parameters that are not sharded: run.replace cannot")
    assert found["plan"] == []
    assert found["plain"]  # after each of them the module is what it was


# ------------------------------------------------------------------------------------------------ one process


def test_with_one_process_nothing_is_shared_out() -> None:
    module = nn.Linear(2, 1)
    task = lw.Supervised(module, nn.MSELoss(), torch.optim.SGD(module.parameters(), 0.1))
    run = lw.Trainer(steps=2, folder=None, progress=False, strategy=lw.FSDP()).fit(
        task, (torch.ones(4, 2), torch.ones(4, 1))
    )
    assert run.team is None
    assert type(module.weight) is nn.Parameter


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lw.FSDP(blocks=3), "blocks=3"),  # type: ignore[arg-type]
        (lambda: lw.FSDP(blocks=("a", nn.Linear(1, 1))), "expected patterns of module names"),  # type: ignore[arg-type]
        (lambda: lw.FSDP(precision="fp8"), "FSDP(precision='fp8') is unknown"),
        (lambda: lw.FSDP(timeout=0), "FSDP(timeout=0); expected a number of seconds above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert text in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 2, 5, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 4096])
def test_rows_are_cut_as_torch_cuts_them(size: int, world: int) -> None:
    found = [region((size,), 0, rank, world) for rank in range(min(world, 70))]
    expected = [chunk.tolist() for chunk in torch.arange(size).chunk(world)] if size else []
    assert [list(range(low, high)) for low, high in found if high > low] == expected


def test_a_rank_without_samples_gets_something_to_compute_on() -> None:
    parts = [Cut(rank, 4, fills=True).part(torch.arange(2), 0) for rank in range(4)]
    assert [(part.batch.tolist(), part.spare) for part in parts] == [
        ([0], True),
        ([0], False),
        ([0], True),
        ([1], False),
    ]
    wholes = [Cut(1, 2, whole=True, fills=True).part(torch.arange(2), number) for number in range(4)]
    assert [(None if p.batch is None else p.batch.tolist(), p.spare) for p in wholes] == [
        ([0, 1], True), ([0, 1], False), (None, False), ([0, 1], False),
    ]  # fmt: skip


def notes(name: str, *bounds: tuple[int, int], rows: int = 7) -> Iterable[Any]:
    whole = torch.arange(rows * 2.0).reshape(rows, 2)
    for start, stop in bounds:
        note = {"dtype": "float32", "shape": [rows, 2], "dim": 0, "start": start, "stop": stop}
        yield {name: note}, {name: whole[start:stop]}


def test_pieces_are_put_together_in_any_order() -> None:
    assert torch.equal(joined(notes("w", (4, 7), (0, 4)), None)["w"], torch.arange(14.0).reshape(7, 2))


@pytest.mark.parametrize(
    "bounds", [[(0, 4)], [(4, 7)], [(0, 4), (3, 7)], [(0, 3), (4, 7)], [(0, 4), (0, 4), (4, 7)], [(0, 4), (4, 6)]]
)
def test_pieces_with_holes_or_rows_twice_are_refused(bounds: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="the pieces of 'w'"):
        joined(notes("w", *bounds), None)


@pytest.mark.parametrize(
    "forged",
    [
        {"shape": [2**40, 2]}, {"shape": [7, -2]}, {"shape": [7.0, 2]}, {"dim": 2}, {"dim": -1}, {"start": -1},
        {"stop": 2**63}, {"dtype": "save"}, {"dtype": "float64"}, {"dtype": "os"},
    ],
)  # fmt: skip
def test_forged_notes_are_refused_before_memory_is_taken(forged: dict[str, Any]) -> None:
    ((note, tensors),) = notes("w", (0, 7))
    with pytest.raises(ValueError, match=r"'w'|dtype"):
        joined([({"w": {**note["w"], **forged}}, tensors)], None)


def test_whole_tensors_are_planned_as_one_file_a_group() -> None:
    (file,) = plan({"model": {"w": torch.ones(2)}})
    assert (file.name, file.group, file.shards) == ("model.safetensors", "model", None)
    assert plan({"model": {"w": torch.ones(2)}}, 1, 2) == []


def test_attributes_of_a_module_may_be_called_hooks() -> None:
    net, own = nn.Linear(2, 2), {"use_hooks": True, "my_hooks": ["one", ["two"]], "n_hooks": 2}
    net.__dict__ |= own
    spread = Spread([net], [], lambda: net.register_forward_hook(print) and None)
    spread.undo()
    assert {name: vars(net)[name] for name in own} == own
    assert not net._forward_hooks
