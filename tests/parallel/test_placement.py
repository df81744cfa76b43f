"""Where each field of a run is with several ranks: what ``Run.placement`` declares, and what two ranks have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw

X = torch.randn(44, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


@pytest.mark.capability("TB-07", "B-13")
def test_every_field_of_a_run_declares_where_it_is_and_what_it_is() -> None:
    """Each field has a placement and a type; no value that lives for a part of a step is a field."""
    named = [field.name for field in fields(lw.Run)]
    assert sorted(lw.Run.placement) == sorted(named)
    at = {where: {n for n in named if lw.Run.placement[n] == where} for where in lw.Run.placement.values()}
    assert set(at) == {"replicated", "sharded", "own", "rank 0"}
    assert at["sharded"] == {"task", "models", "optimizers"}  # and loggers alone are rank 0's while it trains: below
    assert at["rank 0"] == {"loggers", "lost"}
    assert at["replicated"] >= {"progress", "metrics", "history", "stages", "settings", "folder", "stop_reason"}
    for one in fields(lw.Run):
        assert isinstance(one.type, str)
        assert one.type
    assert get_type_hints(lw.Progress)["step"] is int


def plain(value: Any) -> Any:
    """Plain data to be compared; a tuple with the name of the class for anything else."""
    if isinstance(value, lw.History):
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in value]
        return [records, {name: list(losses) for name, losses in value.losses.items()}]
    if isinstance(value, lw.Progress):
        return tuple(value)
    if isinstance(value, (str, int, float, Path, type(None))):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return ("object", type(value).__name__)


class Looks(lw.Callback):
    """Notes what every rank has of each field, at the end of each step and epoch, and after the fit began."""

    def __init__(self) -> None:
        self.apart: set[str] = set()
        self.seen = 0
        self.there: list[Any] = []
        self.computed: set[torch.dtype] = set()

    def on_backward_end(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> None:
        self.computed.add(output["preds"].dtype)

    def look(self, run: lw.Run) -> None:
        mine = {name: plain(getattr(run, name)) for name in lw.Run.placement}
        ranks = run.comm.gather(mine)
        self.apart |= {name for name in mine if any(rank[name] != mine[name] for rank in ranks)}
        self.seen += 1
        (model,) = run.models.values()
        (optimizer,) = run.optimizers.values()
        weight = model.get_parameter("0.weight")
        moved = optimizer.state[weight].get("momentum_buffer", weight)
        held, momentum = (one.to_local() if hasattr(one, "to_local") else one for one in (weight, moved))
        self.there.append((tuple(held.shape), held.detach().clone(), len(run.loggers), tuple(momentum.shape)))

    def on_step_end(self, run: lw.Run, result: Any) -> None:
        self.look(run)

    def on_epoch_end(self, run: lw.Run) -> None:
        self.look(run)


@pytest.mark.slow
@pytest.mark.capability("TB-07", "B-13")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_have_each_field_where_it_is_declared(strategy: str, tmp_path: Path) -> None:
    """Replicated fields are equal at every step, sharded ones are parts with FSDP and equal with DDP; in bf16 too."""

    def fit() -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        task = lw.Supervised(net, nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1, 0.9))
        looks = Looks()
        trainer = lw.Trainer(
            2, strategy=lw.FSDP(blocks=nn.Linear) if strategy == "fsdp" else "ddp", precision="bf16", seed=0,
            callbacks=[looks], folder=tmp_path, name="n", progress=False, log_every=2, accumulate=2,
        )  # fmt: skip
        trainer.fit(task, lw.Loader((X, Y), 8, shuffle=True), lw.Loader((X, Y), 6))
        assert looks.computed == {torch.bfloat16}
        return looks.apart, looks.seen, looks.there

    (apart, seen, first), (again, _, second) = lw.launch(fit, 2)
    assert seen == 2 * 3 + 2
    assert apart == again
    assert {name for name in apart if lw.Run.placement[name] == "replicated"} == set()
    assert {"latest", "series", "loggers"} & apart >= {"latest", "loggers"}
    for (shape, mine, loggers, momentum), (_, other, none, _) in zip(first, second, strict=True):
        assert (loggers, none) == (1, 0)
        assert shape == momentum == ((4, 4) if strategy == "fsdp" else (8, 4))
        assert torch.equal(mine, other) == (strategy == "ddp")
