"""Optimizers made of step functions: a torch optimizer in everything that a user and the loop do with one."""

from __future__ import annotations

import copy
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loopwright as lw
from loopwright.checkpoint import check, read, write
from loopwright.errors import SettingError
from loopwright.optim import Stepwise, adam, decay, lamb, lookahead, radam, sgd
from tiny import classifier, loader, same, trainer

Make = Any


def my_adam(b: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8) -> None:
    """As in the docs: three lines of a user."""
    m, v = b.average("exp_avg", betas[0]), b.average_square("exp_avg_sq", betas[1])
    b.descend(m, lr, beta=betas[0], over=b.root(v, eps, beta=betas[1]))


DECOUPLED = {"decoupled_weight_decay": True, "weight_decay": 0.1}
TWINS: dict[str, tuple[Make, Make]] = {
    "adam": (lambda p: torch.optim.Adam(p, 0.01), lambda p: Stepwise(p, [decay, adam], lr=0.01)),
    "a user's adam": (lambda p: torch.optim.Adam(p, 0.01), lambda p: Stepwise(p, [my_adam], lr=0.01)),
    "adam, l2": (
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        lambda p: Stepwise(p, [decay, adam], lr=0.01, weight_decay=0.1),
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        lambda p: Stepwise(p, [decay, adam], lr=0.01, **DECOUPLED),
    ),
    "radam": (
        lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
        lambda p: Stepwise(p, [decay, radam], lr=0.01, weight_decay=0.1),
    ),
}
SGD: dict[str, tuple[Make, Make]] = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.1), lambda p: Stepwise(p, [sgd], lr=0.1)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: Stepwise(p, [decay, sgd], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
}
OURS: dict[str, Make] = {
    **{name: ours for name, (_, ours) in (TWINS | SGD).items()},
    "lamb": lambda p: Stepwise(p, [lamb], lr=0.01, weight_decay=0.1),
    "ranger": lambda p: Stepwise(p, lookahead(decay, radam), lr=0.01, k=2),
    "capturable": lambda p: Stepwise(p, lookahead(decay, adam), lr=0.01, capturable=True),
}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 2).double())


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients that depend on the step alone; every third parameter has none at every second step."""
    for n in steps:
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * n + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if n % 2 or i % 3 else None
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def far(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).detach().abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", TWINS | SGD)
def test_it_is_the_optimizer_of_torch(name: str) -> None:
    """The bits of torch's foreach form, with two dtypes, and gradients that are missing now and then."""
    theirs, ours = (TWINS | SGD)[name]
    a, b = net(), net()
    torch_optimizer = theirs(a.parameters())
    torch_optimizer.param_groups[0]["foreach"] = True
    descend(a, torch_optimizer, range(12))
    descend(b, ours(b.parameters()), range(12))
    if name == "radam":  # torch adds two terms before it multiplies, we afterwards
        assert far(a, b) < 1e-7
    else:
        assert same(weights(a), weights(b))


@pytest.mark.capability("FA-27", "B-24")
def test_a_users_adam_in_three_lines_is_that_of_torch() -> None:
    """An optimizer from statistics and a stepper: Adam in three lines equals torch's; LAMB and RAdam are as short."""
    assert len(inspect.getsource(my_adam).split('"""')[2].strip().splitlines()) == 2  # three with its def
    a, b = net(), net()
    descend(a, torch.optim.Adam(a.parameters(), 0.01), range(100))
    descend(b, Stepwise(b.parameters(), [my_adam], lr=0.01), range(100))
    assert far(a, b) < 1e-6


@pytest.mark.capability("B-24")
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_state_goes_to_torch_and_back(name: str, fused: bool) -> None:
    """What Stepwise keeps is what torch's optimizers keep: states are interchangeable, in both directions."""
    theirs, ours = TWINS[name]
    whole, a, b = net(), net(), net()
    descend(whole, ours(whole.parameters()), range(9))
    first, second, third = ours(a.parameters()), theirs(b.parameters()), ours(a.parameters())
    descend(a, first, range(3))
    b.load_state_dict(a.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    if fused and name != "radam":
        second.param_groups[0]["fused"] = True
    descend(b, second, range(3, 6))
    a.load_state_dict(b.state_dict())
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    descend(a, third, range(6, 9))
    assert far(a, whole) < 1e-6
    born = ours(a.parameters())
    born.load_state_dict(theirs(b.parameters()).state_dict())
    assert born.param_groups[0]["steps"] == first.param_groups[0]["steps"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("steps", [0, 3])
def test_after_a_checkpoint_it_goes_on_with_the_same_bits(name: str, steps: int) -> None:
    a, b = net(), net()
    optimizer, resumed = OURS[name](a.parameters()), OURS[name](b.parameters())
    descend(a, optimizer, range(steps))
    check(optimizer.state_dict(), "optimizers['o']")
    path = write(Path("checkpoints/a"), {"model": a.state_dict()}, {"o": optimizer.state_dict()}, {})
    descend(a, optimizer, range(steps, steps + 5))
    data = read(path)
    b.load_state_dict(data.files["model"])
    resumed.load_state_dict(data.state["o"])
    descend(b, resumed, range(steps, steps + 5))
    assert same(weights(a), weights(b))
    assert same(optimizer.state_dict(), resumed.state_dict())


@hypothesis.given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.sampled_from(sorted(OURS)))
@hypothesis.settings(max_examples=25)
def test_how_parameters_are_grouped_changes_no_bit(groups: list[int], name: str) -> None:
    a, b = net(), net()
    descend(a, OURS[name](a.parameters()), range(5))
    parts = [[p for p, g in zip(b.parameters(), groups, strict=True) if g == one] for one in sorted(set(groups))]
    descend(b, OURS[name]([{"params": part} for part in parts]), range(5))
    assert same(weights(a), weights(b))


def test_each_group_has_its_own_hyper_parameters() -> None:
    """Weight decay on the weights and not on the biases, another learning rate for the last layer."""
    a, b = net(), net()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = dict(model.named_parameters())
        return [
            {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": 0.5},
            {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0, "lr": 0.02},
        ]

    descend(a, torch.optim.AdamW(groups(a), 0.01, foreach=True), range(5))
    descend(b, Stepwise(groups(b), [decay, adam], lr=0.01, **DECOUPLED), range(5))
    assert same(weights(a), weights(b))


def test_a_schedule_changes_its_hyper_parameters_as_those_of_torch() -> None:
    models = net(), net()
    for model, make in zip(models, TWINS["adamw"], strict=True):
        optimizer = make(model.parameters())
        optimizer.param_groups[0]["foreach"] = True
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=True)
        for n in range(8):
            descend(model, optimizer, range(n, n + 1))
            schedule.step()
        assert optimizer.param_groups[0]["betas"][0] != 0.9
    assert same(*map(weights, models))


def test_a_function_sees_tensors_of_one_dtype_that_have_a_gradient() -> None:
    model, seen = net(), []
    descend(
        model,
        Stepwise(model.parameters(), [lambda b: seen.append([(p.dtype, len(p.shape)) for p in b.params])]),
        range(2),
    )
    single, double = torch.float32, torch.float64
    assert seen[:2] == [[(single, 1), (single, 2)], [(double, 2), (double, 1)]]
    assert seen[2:] == [[(single, 2), (single, 1)] * 2, [(double, 2), (double, 1)]]


def test_a_function_that_replaces_the_gradients_does_so_for_those_that_follow() -> None:
    def halve(bunch: Any) -> None:
        bunch.grads = [grad / 2 for grad in bunch.grads]

    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    Stepwise([weight], [halve, sgd], lr=1.0).step()
    assert (weight.item(), weight.grad.item()) == (-0.5, 1.0)


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = Stepwise([weight], [sgd], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert weight.item() == -0.5


def test_a_gradient_scaler_leaves_a_step_that_overflowed_out() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer, scaler = Stepwise([weight], [sgd], lr=0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (weight.item(), scaler.get_scale()) == (0.0, 4.0)


def test_a_copy_goes_on_by_itself() -> None:
    model = net()
    optimizer = OURS["ranger"](model.parameters())
    descend(model, optimizer, range(3))
    other, again = copy.deepcopy((model, optimizer))
    before = weights(model)
    descend(other, again, range(3, 6))
    assert same(weights(model), before)
    descend(model, optimizer, range(3, 6))
    assert same(weights(model), weights(other))


class Launched(TorchDispatchMode):
    """Counts what the device is asked to do, and what is not done for a whole list at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def twins_after_a_step(name: str, layers: int) -> Iterator[torch.optim.Optimizer]:
    """torch's foreach form and ours, each on a model of its own, after the first step, which makes the state."""
    for make in TWINS[name]:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        optimizer = make(model.parameters())
        optimizer.param_groups[0]["foreach"] = True
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        yield optimizer


@pytest.mark.capability("FA-27", "B-24")
@pytest.mark.parametrize("name", ["adam", "a user's adam", "adamw"])
@pytest.mark.parametrize("layers", [1, 20])
def test_a_step_asks_for_no_more_than_that_of_torch_whatever_the_number_of_tensors(name: str, layers: int) -> None:
    """A step launches at most as many operations as torch's foreach form, and a few over lists do the work."""
    counts = []
    for optimizer in twins_after_a_step(name, layers):
        with Launched() as launched:
            optimizer.step()
        counts.append(launched.names)
    theirs, ours = counts
    assert len(ours) <= len(theirs)  # all that is asked, reading numbers of steps included
    lists = [sum(name.startswith("_foreach_") for name in names) for names in counts]
    assert lists[1] <= lists[0] < 12


@pytest.mark.capability("FA-27", "B-24")
@pytest.mark.parametrize("name", ["adam", "a user's adam", "adamw"])
@pytest.mark.parametrize("layers", [1, 20])
def test_a_step_takes_fewer_calls_than_that_of_torch(name: str, layers: int) -> None:
    """The rest of what a step costs: its calls and Python's instructions, at most 0.8 of those of torch's foreach form.

    Calls in Python and from there to C; a loop that calls nothing is seen by its instructions.
    """
    theirs, ours = [calls(optimizer.step) for optimizer in twins_after_a_step(name, layers)]
    assert ours <= 0.8 * theirs
    theirs, ours = [instructions(optimizer.step) for optimizer in twins_after_a_step(name, layers)]
    assert ours <= 0.8 * theirs


def calls(function: Any) -> int:
    """How many functions ``function`` calls, in Python and in C."""
    seen: list[str] = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in seen)


def instructions(function: Any) -> int:
    """How many instructions Python computes in ``function``."""
    count = 0

    def each(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return each

    before = sys.gettrace()
    sys.settrace(each)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.capability("B-24")
@pytest.mark.parametrize("name", ["a user's adam", "adamw", "ranger"])
def test_a_compiled_step_is_one_graph_and_computes_the_same(name: str) -> None:
    """A step compiles to one graph, with numbers of steps as tensors, so that none of them is a new one."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    a, b = net()[:3], net()[:3]
    optimizer, compiled = OURS[name](a.parameters()), OURS[name](b.parameters())
    step = torch.compile(compiled.step, fullgraph=True, backend="eager")
    graphs = []
    for n in range(1, 9, 2):
        descend(a, optimizer, range(n, n + 1))
        compiled.step = lambda *_: step()
        descend(b, compiled, range(n, n + 1))
        del compiled.step
        graphs.append(counters["stats"]["unique_graphs"])
    assert far(a, b) < 1e-5
    assert graphs[1] == graphs[-1]  # one without any state, one with
    torch._dynamo.reset()


@pytest.mark.capability("B-24")
@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for a CPU")
def test_a_step_compiled_to_machine_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of a user's Adam: one graph, made to code by torch's own backend, and torch's Adam to 1e-6."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    a, b = net()[:1], net()[:1]
    theirs, optimizer = (make(model.parameters()) for make, model in zip(TWINS["a user's adam"], (a, b), strict=True))
    descend(a, theirs, range(1, 5, 2))
    descend(b, optimizer, range(1, 5, 2))  # the state is there: one graph is enough
    step = torch.compile(optimizer.step, fullgraph=True)
    optimizer.step = lambda *_: step()
    descend(a, theirs, range(5, 11, 2))
    descend(b, optimizer, range(5, 11, 2))
    assert far(a, b) < 1e-6
    assert list(tmp_path.rglob("*.so"))
    torch._dynamo.reset()


@pytest.mark.capability("B-24")
@pytest.mark.parametrize("name", ["a user's adam", "adam", "radam", "lamb", "ranger"])
def test_a_capturable_step_reads_nothing_from_the_device(name: str) -> None:
    """No operation of a step makes a number of a tensor, which would wait for the device; without the flag some do."""
    read = []
    for capturable in (True, False):
        model = net()
        optimizer = OURS[name](model.parameters())
        optimizer.param_groups[0]["capturable"] = capturable
        descend(model, optimizer, range(2))
        with Launched() as launched:
            optimizer.step()
        read.append({"_local_scalar_dense", "is_nonzero", "nonzero"} & set(launched.names))
    assert read == [set(), {"_local_scalar_dense"}]


@pytest.mark.capability("B-24")
@pytest.mark.parametrize("name", ["a user's adam", "adam", "radam", "lamb", "ranger"])
def test_a_capturable_step_counts_on_the_device_of_its_parameters(name: str) -> None:
    """The number of steps lies where the parameter does, so that a graph of the device can move it."""
    model = nn.Linear(4, 3, device="meta")
    optimizer = OURS[name](model.parameters())
    optimizer.param_groups[0]["capturable"] = True
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert {optimizer.state[p]["step"].device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["a user's adam", "adam", "radam", "lamb", "ranger"])
def test_capturable_steps_are_tensors_and_the_weights_nearly_the_same(name: str) -> None:
    """Powers of float32 numbers instead of Python's: as far from it as torch's own capturable form."""
    a, b = net(), net()
    optimizer, captured = OURS[name](a.parameters()), OURS[name](b.parameters())
    captured.param_groups[0]["capturable"] = True
    descend(a, optimizer, range(12))
    descend(b, captured, range(12))
    assert far(a, b) < 1e-4
    assert captured.state[b[0].weight]["step"].item() == 6


def test_inside_a_trainer_it_is_checkpointed_and_resumed_at_every_step(folder: Path) -> None:
    def fit(steps: int, seed: int, **how: Any) -> Any:
        torch.manual_seed(seed)
        model = classifier(dropout=0.2, seed=seed)
        task = lw.Supervised(model, nn.CrossEntropyLoss(), OURS["ranger"](model.parameters()))
        user = trainer(steps=steps, folder=folder, name="a", checkpoint=lw.Checkpoint("1 step", keep=20), clip_norm=1.0)
        user.fit(task, loader(20, batch_size=4, shuffle=True), **how)
        return weights(model)

    whole = fit(8, 1)
    paths = sorted(folder.rglob("checkpoints/step-*"))
    assert len(paths) == 8
    for path in paths[:-1]:
        assert same(fit(8, 7, resume=path), whole)


# ------------------------------------------------------------------------------------------ what is refused


def refused(match: str, make: Any) -> None:
    with pytest.raises(SettingError, match=match):
        make()


def test_wrong_hyper_parameters_are_refused_with_the_fix() -> None:
    params = [nn.Parameter(torch.ones(1))]
    refused("no step function takes 'beta' .adam.*Did you mean 'betas'", lambda: Stepwise(params, [adam], beta=1))
    refused("lr has no default; pass it", lambda: Stepwise(params, [sgd]))
    refused("expected step functions", lambda: Stepwise(params, []))
    refused("expected step functions", lambda: Stepwise(params, ["adam"]))  # type: ignore[list-item]
    refused(
        r"eps has two defaults, 1e-08 and 1e-06 \(of lamb\); say which: eps=", lambda: Stepwise(params, [adam, lamb])
    )
    refused("must take a bunch and then hyper-parameters", lambda: Stepwise(params, [lambda bunch, *rest: None]))
    refused("must take a bunch and then hyper-parameters", lambda: Stepwise(params, [lambda: None]))
    refused("other than params, steps", lambda: Stepwise(params, [lambda bunch, steps=1: None]))
    assert Stepwise(params, [adam, lamb], eps=1e-7).defaults["eps"] == 1e-7


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    step = Stepwise(embedding.parameters(), [adam]).step
    refused(r"a parameter of shape \[4, 2\] is torch.sparse_coo. Use sparse=False", step)
    number = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    refused(r"a complex one of shape \[1\]. Give it to an optimizer of torch", lambda: Stepwise([number], [adam]))


def test_a_state_of_other_functions_is_refused() -> None:
    params = [nn.Parameter(torch.ones(1))]
    ours = Stepwise(params, [decay, adam])
    other = Stepwise(params, [decay, radam]).state_dict()
    refused(
        r"made with the steps \[decay, radam\], and this optimizer has \[decay, adam\]",
        lambda: ours.load_state_dict(other),
    )
    strict = torch.optim.Adam(params, amsgrad=True).state_dict()
    refused("this state has amsgrad=True", lambda: ours.load_state_dict(strict))
    simple = torch.optim.SGD(params, 0.1).state_dict()
    refused("this state has no betas, decoupled_weight_decay, eps", lambda: ours.load_state_dict(simple))


def test_a_slip_in_a_group_is_told_with_the_nearest_name() -> None:
    params = [nn.Parameter(torch.ones(1))]
    known = r"Known: 'betas', 'decoupled_weight_decay', 'eps', 'lr', 'weight_decay'\. Did you mean 'weight_decay'\?"
    told = rf"a group has 'weigth_decay', which no step function takes \(decay, adam\)\. {known}"
    refused(told, lambda: Stepwise([{"params": params, "weigth_decay": 1.0}], [decay, adam]))
    optimizer = Stepwise([{"params": params, "name": "all", "initial_lr": 0.1, "foreach": None}], [decay, adam])
    refused(told, lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weigth_decay": 1.0}))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("hypers", "told"),
    [
        ({"lr": -1.0}, "lr=-1.0: expected a number from 0"),
        ({"lr": float("nan")}, "lr=nan: expected a number from 0"),
        ({"eps": -1e-8}, "eps=-1e-08: expected a number from 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected a number from 0"),
        ({"betas": (1.5, 0.9)}, r"betas=\(1.5, 0.9\): expected numbers from 0 to below 1, such as \(0.9, 0.999\)"),
        ({"k": 0}, "k=0: lookahead expected a whole number of steps, from 1"),
        ({"k": 2.5}, "k=2.5: lookahead expected a whole number"),
        ({"alpha": 1.5}, "alpha=1.5: lookahead expected a number from 0 to 1"),
    ],
)
def test_values_that_the_optimizers_of_torch_refuse_are_refused_here_too(hypers: dict[str, Any], told: str) -> None:
    params = [nn.Parameter(torch.ones(1))]
    refused(told, lambda: Stepwise(params, lookahead(decay, adam), **hypers))
    refused(told, lambda: Stepwise([{"params": params, **hypers}], lookahead(decay, adam)))


def test_what_a_users_function_calls_k_is_the_users() -> None:
    def plain(bunch: Any, lr: float = 0.1, k: int = 0) -> None:
        bunch.descend(bunch.grads, lr + k)

    assert Stepwise([nn.Parameter(torch.ones(1))], [plain]).defaults["k"] == 0


def test_groups_without_decay_are_taken_as_they_come() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    made = Stepwise(lw.groups(net, no_decay=True), [decay, adam], lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]
