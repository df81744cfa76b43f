"""Random erasing is algorithm 1 of its paper; a batch transform is called with each batch of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from pictures import N, images, net, seen_through, spy
from resumed import resumes_exactly
from tiny import sgd_task, trainer


def run_of() -> lw.Run:
    return trainer(epochs=1, seed=3).fit(sgd_task(nn.Linear(1, 1)), [(torch.ones(2, 1), torch.ones(2, 1))])


def erased(callback: lw.RandomErasing, x: torch.Tensor, batches: int = 100) -> list[torch.Tensor]:
    run = run_of()
    callback.on_fit_start(run)
    return [callback.map_batch(run, (x, 0))[0] for _ in range(batches)]


def test_it_is_algorithm_1_on_the_first_batch_and_the_hundredth() -> None:
    size, scale, ratio = 40, (0.05, 0.2), (0.5, 2.0)
    x = torch.ones(16, 3, size, size)
    areas, ratios, count = [], [], 0
    for out in erased(lw.RandomErasing(0.5, scale=scale, ratio=ratio, value=0.0), x):
        masks = (out == 0).all(1)
        assert torch.equal(masks, (out == 0).any(1))  # all channels
        for mask in masks[masks.flatten(1).any(1)]:
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns[None])
            tall, wide = int(rows.sum()), int(columns.sum())
            assert rows.nonzero().max() - rows.nonzero().min() + 1 == tall
            areas.append(tall * wide / size**2)
            ratios.append(tall / wide)
            count += 1
    assert abs(count / 1600 - 0.5) < 0.05
    assert scale[0] - 0.01 < min(areas) < 0.06
    assert 0.18 < max(areas) < scale[1] + 0.02
    assert ratio[0] - 0.1 < min(ratios) < 0.6
    assert 1.9 < max(ratios) < ratio[1] + 0.2


def test_the_rectangle_lies_anywhere_in_the_image() -> None:
    out = torch.cat(erased(lw.RandomErasing(1.0, scale=(0.1, 0.1), ratio=(1, 1), value=0.0), torch.ones(16, 1, 20, 20)))
    share = (out == 0).double().mean((0, 1))
    assert bool((share[4:-4, 4:-4] > 0.05).all())  # by rejection: each place inside as often as any other
    assert float(share.max()) < 0.25


@pytest.mark.parametrize(
    ("value", "inside"),
    [(0.25, lambda v: bool((v == 0.25).all())), ((1.0, 2.0), lambda v: set(v.unique().tolist()) == {1.0, 2.0}),
     ("noise", lambda v: abs(float(v.mean())) < 0.1 and abs(float(v.std()) - 1) < 0.1)],
)  # fmt: skip
def test_what_takes_its_place(value: Any, inside: Any) -> None:
    x = torch.full((8, 2, 16, 16), 9.0)
    out = torch.cat(erased(lw.RandomErasing(1.0, value=value), x, 20))
    assert inside(out[out != 9])


def test_arguments_that_cannot_be_used_are_refused() -> None:
    for arguments in ({"p": 0}, {"scale": (0.5, 0.1)}, {"ratio": (0, 1)}, {"value": "nois"}):
        ((name, value),) = arguments.items()
        with pytest.raises(lw.SettingError, match=rf"RandomErasing\({name}=.*\): expected"):
            lw.RandomErasing(**arguments)
        assert value is not None


def test_a_batch_transform_is_called_with_each_batch_of_training_and_no_other() -> None:
    sizes: list[int] = []

    def half(batch: Any) -> Any:
        sizes.append(len(batch[0]))
        return batch[0][:3], batch[1][:3]

    task = sgd_task(net(), loss=nn.CrossEntropyLoss())
    run = trainer(epochs=2, callbacks=[lw.BatchTransform(half)]).fit(task, images(3), images(2))
    assert sizes == [N] * 6
    assert run.progress.samples == 3 * 6  # what is trained on counts


def transformed(**settings: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], lw.Run]:
    """What an item transform and a batch transform were given in a fit."""
    items: list[torch.Tensor] = []
    batches: list[torch.Tensor] = []

    def item(sample: Any) -> Any:
        items.append(sample[0])
        return sample[0].flip(-1), sample[1]

    def whole(batch: Any) -> Any:
        batches.append(batch[0])
        return batch[0] - batch[0].mean((0, 2, 3), keepdim=True), batch[1]

    x, y = images(1)[0]
    train = lw.Loader((x, y), 3, transform=item)
    task = sgd_task(net(), loss=nn.CrossEntropyLoss())
    run = trainer(epochs=1, callbacks=[lw.BatchTransform(whole)], **settings).fit(task, train, (x, y))
    assert len(items) == len(x)
    assert [len(batch) for batch in batches] == [len(part) for part in x.split(3)]
    assert torch.equal(torch.cat([b.float().cpu() for b in batches]), x.flip(-1))  # items first
    return items, batches, run


@pytest.mark.capability("FA-09")
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_items_are_transformed_one_by_one_on_the_cpu_and_batches_where_the_model_is(precision: str) -> None:
    """Item transforms see one sample on the CPU, batch transforms the batch after its move to device and precision."""
    items, batches, run = transformed(precision=precision)
    assert {(x.ndim, x.dtype, x.device.type) for x in items} == {(3, torch.float32, "cpu")}
    moved_to = torch.float64 if precision == "fp64" else torch.float32
    assert {(x.ndim, x.dtype, x.device) for x in batches} == {(4, moved_to, run.device)}


@pytest.mark.gpu
def test_batches_are_transformed_on_the_gpu() -> None:
    items, batches, run = transformed(device="cuda")
    assert {x.device.type for x in items} == {"cpu"}
    assert {x.device.type for x in batches} == {run.device.type} == {"cuda"}


def test_a_batch_transform_has_a_stream_of_its_own(folder: Any) -> None:
    def noise(batch: Any, rng: torch.Generator) -> Any:
        return batch[0] + torch.randn(batch[0].shape, generator=rng), batch[1]

    before = torch.get_rng_state()
    first, again = (seen_through(lw.BatchTransform(noise), data=images(3)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0] - images(3)[0][0], first[1][0] - images(3)[1][0])
    torch.set_rng_state(before)

    def make() -> tuple[Any, list[lw.Callback]]:
        model = net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return lw.Supervised(model, nn.CrossEntropyLoss(), sgd), [lw.BatchTransform(noise), spy([])]

    resumes_exactly(make, lambda: images(3))


def test_a_function_that_cannot_be_called_so_is_refused() -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.BatchTransform(lambda a, b, c: a)
    assert str(caught.value) == (
        "fn needs the arguments a, b, c; expected fn(batch), or fn(batch, rng) with a torch.Generator. Fix the others "
        "with functools.partial"
    )
