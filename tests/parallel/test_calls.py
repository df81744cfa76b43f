"""What each rank has called of the others, and where the calls do not match."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn

import loopwright as lw
from loopwright._compat import recorded_collectives
from loopwright.parallel.calls import Call, clash, last_calls


def call(number: int, key: str = "all_reduce", group: str = "default_pg gloo") -> Call:
    return Call(group, number, key, key, f"train.py:{number} in step")


BOTH = [call(1), call(1, group="loopwright gloo"), call(2), call(3), call(2, group="loopwright gloo"), call(4)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5))
def test_ranks_that_are_not_equally_far_or_have_forgotten_their_first_calls_do_not_clash(
    parts: list[tuple[int, int]],
) -> None:
    assert clash({rank: BOTH[min(part) : max(part)] for rank, part in enumerate(parts)}) is None


@given(st.integers(0, 3), st.integers(1, 4))
def test_one_call_that_differs_is_found_whoever_makes_it_and_however_far_the_others_are(rank: int, number: int) -> None:
    calls = {r: [call(n) for n in range(1, 5 + r)] for r in range(4)}
    calls[rank][number - 1] = call(number, "barrier")
    found = clash(calls)
    assert found is not None
    assert found[0] == f"call {number} of the default group"
    assert found[1][rank] == f"barrier, train.py:{number} in step"
    assert set(found[1]) == {0, 1, 2, 3}


def test_two_ranks_that_wait_for_one_another_in_two_groups_are_found() -> None:
    mine, theirs = [*BOTH, call(5)], [*BOTH, call(3, "all_gather", "loopwright gloo")]
    assert clash({0: mine, 1: theirs}) == (
        "each waits for a call that the other has not made",
        {0: "all_reduce, train.py:5 in step", 1: "all_gather, train.py:3 in step"},
    )
    assert clash({0: mine, 1: BOTH}) is None


def made() -> tuple[list[Call], list[str]]:
    dist.init_process_group("gloo")
    rank, x = dist.get_rank(), torch.ones(4)
    alone = dist.new_group([0])
    net = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    begun = len(last_calls())
    net(torch.ones(1, 3)).sum().backward()
    if rank == 0:  # of a group that not all are in, and from one to one: neither is a call of all
        dist.all_reduce(x, group=alone)
        dist.send(x, 1)
    else:
        dist.recv(x, 0)
    dist.broadcast(x.view(2, 2) if rank else x, 0)  # as many numbers, in another shape
    dist.gather(x, [x.clone(), x.clone()] if rank == 0 else None)
    dist.scatter(x, [x.clone(), x.clone()] if rank == 0 else None)
    dist.all_reduce(x.double()[:2])
    names = [entry["profiling_name"] for entry in recorded_collectives()]
    return last_calls()[begun:], names


@pytest.mark.capability("B-25")
def test_torch_notes_every_collective_with_its_shapes_and_the_line_that_called_it() -> None:
    (first, names), (second, _) = lw.launch(made, 2)
    if not names:
        pytest.skip("this torch keeps no notes")
    here = os.path.basename(__file__)
    line = made.__code__.co_firstlineno
    told = [(one.what, one.place.rpartition("/")[2]) for one in first]
    assert told == [
        ("all_reduce(float[8])", f"{here}:{line + 6} in made"),  # of DistributedDataParallel, in backward
        ("broadcast(float[4])", f"{here}:{line + 12} in made"),
        ("gather(float[4])", f"{here}:{line + 13} in made"),
        ("scatter(float[2, 4])", f"{here}:{line + 14} in made"),
        ("all_reduce(double[2])", f"{here}:{line + 15} in made"),
    ]
    assert clash({0: first, 1: second}) is None
    other = dict(zip(Call._fields, second[-1], strict=True)) | {"what": "all_reduce(double[3])", "key": "another"}
    assert clash({0: first, 1: [*second[:-1], Call(**other)]}) is not None


def uneven() -> Any:
    samples = 64 - 16 * int(os.environ["RANK"])
    net = nn.Linear(4, 2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    data = lw.Loader((torch.zeros(samples, 4), torch.zeros(samples, dtype=torch.long)), 16)
    lw.Trainer(epochs=1, folder=None, progress=False).fit(task, data)


def test_data_of_other_lengths_is_refused_before_the_first_step() -> None:
    with pytest.raises(lw.DataError, match="stage 'main' has not as many batches on all ranks: 4 on rank 0, 3 on rank"):
        lw.launch(uneven, 2)
