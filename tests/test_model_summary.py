"""lw.summary: shapes, parameters, FLOPs and memory are the known ones, and the model is as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.flops import Operations
from tiny import bits, classifier, same, seed_all


def layers(told: lw.ModelSummary) -> dict[str, Any]:
    return {layer.path: layer for layer in told.layers}


class Tied(nn.Module):
    """A decoder with the weights of its encoder, a layer that is called twice, one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.unused = nn.Linear(2, 3)
        self.unused.weight.requires_grad_(False)

    def forward(self, x: Tensor, *, more: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.decode(self.encode(self.encode(x))), "more": (more["a"], None)}


def test_shapes_parameters_flops_and_memory_are_the_known_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    told = lw.summary(net, torch.zeros(5, 3, 8, 8))
    found = layers(told)
    assert [(one.inputs, one.output) for one in told.layers] == [
        ("[5, 3, 8, 8]", "[5, 2]"), ("[5, 3, 8, 8]", "[5, 8, 6, 6]"), ("[5, 8, 6, 6]", "[5, 8, 6, 6]"),
        ("[5, 8, 6, 6]", "[5, 8, 6, 6]"), ("[5, 8, 6, 6]", "[5, 288]"), ("[5, 288]", "[5, 2]"),
    ]  # fmt: skip
    conv, linear = 2 * 5 * 8 * 36 * 27, 2 * 5 * 288 * 2
    assert (found["0"].flops, found["4"].flops, found["2"].flops, told.flops) == (conv, linear, 0, conv + linear)
    assert (found["0"].parameters, found["1"].parameters, found["4"].parameters) == (216, 16, 578)
    assert told.parameters == told.trained == 216 + 16 + 578
    assert told.memory["weights"] == told.memory["gradients"] == 810 * 4
    assert (told.memory["inputs"], told.memory["buffers"]) == (5 * 192 * 4, 2 * 8 * 4 + 8)
    map_bytes = 5 * 8 * 36 * 4
    assert 2 * map_bytes <= told.memory["saved for backward"] <= 2 * map_bytes + 200  # for batch norm, for ReLU


def test_shared_parameters_are_counted_once_and_calls_are_told() -> None:
    told = lw.summary(Tied(), {"x": torch.zeros(3, 4), "more": {"a": torch.zeros(2)}})
    found = layers(told)
    assert (told.parameters, told.trained) == (16 + 9, 16 + 3)
    assert (found["encode"].calls, found["encode"].flops) == (2, 2 * 2 * 3 * 16)
    assert (found["decode"].shared, found["encode"].shared) == (True, False)
    assert found[""].inputs == "x=[3, 4], more={a: [2]}"
    assert found[""].output == "{y: [3, 4], more: ([2], None)}"
    text = str(told)
    assert "  encode Linear x2  " in text
    assert "  unused Linear (not called)" in text
    assert " 9 (3 trained)  " in text
    assert " shared  " in text
    assert "parameters: 25, of which 19 are trained" in text


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training: bool) -> None:
    """Weights, buffers, gradients, flags, hooks and random generators are the same bits as before."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier(dropout=0.5, batch_norm=True)
            self.seen: Tensor
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Any:
            self.seen = self.seen + 1  # another tensor in its place
            self.net[1].running_mean += torch.rand(8)  # type: ignore[operator]
            return self.net(x) + torch.rand(3)

    net = Counts().train(training)
    net.net[0].eval()
    net(torch.zeros(4, 5)).sum().backward()
    seed_all(3)
    gradients = [p.grad for p in net.parameters()]
    before, flags, seen = bits(net), [m.training for m in net.modules()], net.seen
    lw.summary(net, torch.zeros(4, 5))
    assert same(bits(net), before)
    assert [m.training for m in net.modules()] == flags
    assert all(a is p.grad for a, p in zip(gradients, net.parameters(), strict=True))
    assert net.seen is seen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_lazy_model_is_told_and_stays_lazy() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 2))
    told = lw.summary(net, torch.zeros(6, 4))
    assert told.problem is None
    assert told.parameters == 40 + 16 + 18
    assert net[0].has_uninitialized_params()
    assert net[1].has_uninitialized_params()  # type: ignore[operator]
    net(torch.zeros(6, 7))  # it may still become another one


def test_a_forward_that_fails_is_told_with_its_layer_and_the_shapes_up_to_there() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 2)), nn.Linear(2, 2))
    told = lw.summary(net, torch.zeros(16, 4))
    assert told.problem == (
        "1.1 (Linear) raised RuntimeError for [16, 8]: mat1 and mat2 shapes cannot be multiplied (16x8 and 9x2)"
    )
    assert [(one.path, one.output) for one in told.layers] == [
        ("", ""), ("0", "[16, 8]"), ("1", ""), ("1.0", "[16, 8]"), ("1.1", ""),
    ]  # fmt: skip
    assert str(told).splitlines()[-1] == f"PROBLEM: {told.problem}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    told = lw.summary(classifier(), {"wrong": torch.zeros(2, 5)})
    assert told.problem is not None
    assert told.problem.startswith("Sequential raised TypeError for wrong=[2, 5]: ")


def test_depth_folds_what_lies_deeper() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    told = lw.summary(net, torch.zeros(1, 4), depth=1)
    assert [one.path for one in told.layers] == ["", "0", "1"]
    assert layers(told)["1"].parameters == 18
    assert told.flops == lw.summary(net, torch.zeros(1, 4)).flops


def test_a_notebook_gets_a_table() -> None:
    page = lw.summary(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))._repr_html_()
    assert page.startswith("<table><thead><tr><th")
    assert ">&nbsp;&nbsp;0&nbsp;Linear</td>" in page
    assert page.endswith("inputs 16 B</p>")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"lw.summary needs an nn.Module; got float32\[2\]"):
        lw.summary(torch.zeros(2), torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(lw.SettingError, match="depth=0: expected a whole number from 1, or None for all layers"):
        lw.summary(nn.Linear(1, 1), torch.zeros(1, 1), depth=0)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


class Calls(nn.Module):
    """Calls a function of tensors."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


ROWS, WIDTH = 2 * 10, 16  # two sequences of ten
MULTI_HEAD = 2 * ROWS * WIDTH * 4 * WIDTH + 2 * 2 * ROWS * 10 * WIDTH  # four projections, two products of the attention
SEQUENCES, VALUES = torch.zeros(2, 5, 8), torch.zeros(2, 10, WIDTH)
FLOPS: dict[str, tuple[Any, Any, int]] = {
    "LSTM": (nn.LSTM(8, 16, batch_first=True), SEQUENCES, 2 * 10 * 4 * 16 * (8 + 16)),
    "LSTM, two ways": (nn.LSTM(8, 16, bidirectional=True), SEQUENCES, 2 * 2 * 10 * 4 * 16 * (8 + 16)),
    "LSTM, two layers": (nn.LSTM(8, 16, 2), SEQUENCES, 2 * 10 * 4 * 16 * (8 + 16 + 16 + 16)),
    "GRU": (nn.GRU(8, 16, batch_first=True), SEQUENCES, 2 * 10 * 3 * 16 * (8 + 16)),
    "RNN": (nn.RNN(8, 16, batch_first=True), SEQUENCES, 2 * 10 * 16 * (8 + 16)),
    "attention": (Calls(attention), (torch.zeros(2, 4, 10, 8),) * 3, 2 * 2 * 2 * 4 * 10 * 10 * 8),
    "cross attention": (
        Calls(attention), (torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)),
        2 * 2 * 2 * 4 * 10 * 7 * 8,
    ),
    "multi-head": (nn.MultiheadAttention(WIDTH, 4, batch_first=True), (VALUES,) * 3, MULTI_HEAD),
    "encoder": (nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True), VALUES,
                MULTI_HEAD + 2 * 2 * ROWS * WIDTH * 32),
    "a vector": (Calls(lambda m, v: m @ v), (torch.zeros(3, 4), torch.zeros(4)), 2 * 12),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOPS)
def test_the_flops_of_recurrent_layers_and_of_attention_are_the_known_ones(what: str) -> None:
    module, inputs, expected = FLOPS[what]
    told = lw.summary(module, inputs)
    assert (told.flops, told.not_counted) == (expected, [])
    module.eval()
    with torch.no_grad(), Operations() as count:  # other kernels, where nothing is to be kept for a backward
        module(*(inputs if isinstance(inputs, tuple) else [inputs]))
    assert (count.total, count.left_out) == (expected, [])


def test_a_padded_batch_counts_the_lengths_of_its_sequences() -> None:
    """What an encoder computes of a batch with padding, where it leaves that out."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True), 1).eval()
    padding = torch.arange(10) >= torch.tensor([[10], [4]])
    with warnings.catch_warnings(), torch.no_grad(), Operations() as count:
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        net(VALUES, src_key_padding_mask=padding)
    assert count.total == 2 * 14 * WIDTH * (4 * WIDTH + 2 * 32) + 2 * 2 * (100 + 16) * WIDTH


def test_what_has_no_formula_is_said_to_be_not_counted() -> None:
    told = lw.summary(nn.Sequential(nn.Linear(4, 4), Calls(lambda x: nn.Bilinear(4, 4, 2)(x, x))), torch.zeros(3, 4))
    assert told.not_counted == ["aten._trilinear"]
    assert "forward: 96 FLOPs (matrix products, convolutions, attention); not counted: aten._trilinear" in str(told)
