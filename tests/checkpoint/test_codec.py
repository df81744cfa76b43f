"""Nested state through write and read: what comes back means the same."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loopwright import rng
from loopwright.checkpoint import check, decode, encode, read, write
from loopwright.errors import CheckpointError


def through_disk(value: Any, folder: Path | None = None) -> Any:
    """``value`` written to a checkpoint and read again."""
    path = write((folder or Path()) / "checkpoints" / "step-1", {}, {"value": value}, {})
    return read(path).state["value"]


def same(a: Any, b: Any) -> bool:
    """The same types, values, order, bits of floats and tensors, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.layout == torch.sparse_coo:
            a, b = a.coalesce(), b.coalesce()
            return same(a.indices(), b.indices()) and same(a.values(), b.values()) and a.shape == b.shape
        bits = [t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, dict):
        factories = getattr(a, "default_factory", None), getattr(b, "default_factory", None)
        return factories[0] is factories[1] and same([*a.items()], [*b.items()])
    return bool(a == b)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    st.sampled_from([torch.float32, torch.bool, torch.Size([2, 3]), torch.Size([])]),
    st.sampled_from([torch.device("cuda:1"), Path("a/b")]),
    st.floats(width=32).map(np.float32), st.integers(-128, 127).map(np.int8), st.booleans().map(np.bool_),
)  # fmt: skip
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4).filter(
    lambda k: "nan" not in repr(k)  # which is equal to nothing, so a set of it cannot be compared
)
dtypes = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    dtype = draw(st.sampled_from(dtypes))
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    order = draw(st.permutations(range(tensor.ndim)))
    return tensor.permute(order)[::1] if tensor.ndim else tensor


values = st.recursive(
    st.one_of(scalars, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.just("@")), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=4).map(lambda d: defaultdict(list, d)),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
        st.tuples(st.lists(inner, max_size=4), st.one_of(st.none(), st.integers(4, 9))).map(lambda p: deque(*p)),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=12,
)


@given(values)
def test_any_state_comes_back_as_it_was(value: Any) -> None:
    assert same(through_disk(value), value)


@given(values)
def test_encoded_state_is_standard_json(value: Any) -> None:
    import json

    plain, tensors = encode(value)
    text = json.dumps(plain, allow_nan=False)
    assert same(decode(json.loads(text), tensors), value)


@pytest.mark.parametrize(
    "value",
    [
        10**5000, -(2**63) - 1, -0.0, float("nan"), float("-inf"), complex(float("inf"), -0.0),
        "\ud800", "\0", b"\0\xff",
        {1: "a", "1": "b", (1, 2): "c", None: "d", 1.5: "e", b"k": "f"}, {"@": "tuple", "v": [1]},
        {True: 1}, Counter("hello"), Counter({"a": -1}), OrderedDict([("b", 1), ("a", 2)]), deque([1, 2], maxlen=2),
        defaultdict(set, {"a": {1}}), defaultdict(None, {"a": 1}), frozenset({(1, "a")}), range(10, 0, -3),
        torch.Size([2, 0]), torch.float8_e4m3fn, torch.device("meta"), Path("a") / "b",
        np.arange(6).reshape(2, 3)[:, ::2], np.array(3.5), np.zeros((0, 3), np.float32), np.array(["ab", "c"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"), np.arange(3, dtype=">i4"), np.asfortranarray(np.eye(3)),
        np.array([1 + 2j]), np.float16(1.5), np.str_("hi"), np.str_(""), np.bytes_(b"x"), np.timedelta64(3, "s"),
        np.longdouble(1) / 3, np.array([b"a\0b"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_special_values_keep_their_meaning(value: Any) -> None:
    back = through_disk(value)
    assert same(back, value)


def test_the_state_of_every_generator_round_trips() -> None:
    state = rng.get()
    expected = torch.rand(3), np.random.randn(3)
    rng.set(through_disk(state))
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.randn(3) == expected[1]).all()


def test_order_of_a_dict_is_kept() -> None:
    assert list(through_disk({"b": 1, "a": 2})) == ["b", "a"]
    assert list(through_disk({2: 1, 1: 2})) == [2, 1]


def test_tied_tensors_stay_tied_and_others_apart() -> None:
    a = torch.arange(4.0)
    back = through_disk({"a": a, "again": [a, a.view(4)], "part": a[:2], "equal": a.clone()})
    assert back["again"][0] is back["a"]
    assert back["again"][1] is back["a"]
    assert back["equal"] is not back["a"]
    back["a"].add_(1)
    assert torch.equal(back["part"], torch.tensor([0.0, 1.0]))


def test_tensors_stay_tied_across_files() -> None:
    moments = torch.ones(2)
    state = read(write(Path("checkpoints/a"), {}, {"optimizers": {"m": moments}, "mine": moments}, {})).state
    assert state["mine"] is state["optimizers"]["m"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.arange(10.0)[::2],
        torch.ones(1).expand(5),
        torch.tensor(3),
        torch.empty(0, 4),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex128).imag,
        torch.randn(2, 2, dtype=torch.complex128).T,
        torch.tensor([1, 2, 255]).to(torch.float8_e5m2),
    ],
)
def test_tensors_keep_values_shape_dtype_and_order_in_memory(tensor: Tensor) -> None:
    back = through_disk([tensor])[0]
    assert same(back, tensor)
    assert back.stride() == tensor.clone().stride()  # clone too keeps the order of dense tensors and packs the others
    assert back.data_ptr() % 64 == 0 or not back.numel()


def test_sparse_tensors_come_back_coalesced() -> None:
    tensor = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
    back = through_disk(tensor)
    assert back.is_coalesced()
    assert torch.equal(back.to_dense(), torch.tensor([3.0, 0.0, 3.0, 0.0]))


def test_parameters_become_plain_tensors() -> None:
    back = through_disk({"w": nn.Parameter(torch.ones(2))})["w"]
    assert type(back) is Tensor
    assert not back.requires_grad


class Marked(Tensor):
    """A subclass, as quantization libraries make them."""


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": len}, "['x'] is a builtin_function_or_method, which cannot be saved in a checkpoint; return numbers,"),
        ({"x": [1, {2: Point(1, 2)}]}, "['x'][1][2] is a test_codec.Point, which cannot be saved in a checkpoint; "
         "return value._asdict() instead"),
        ({"net": nn.Linear(1, 1)}, "['net'] is a torch.nn.modules.linear.Linear, which cannot be saved in a "
         "checkpoint; return its state_dict() instead"),
        ({"t": Marked(torch.ones(1).numpy())}, "['t'] is a test_codec.Marked, which cannot be saved; convert it to a "
         "plain tensor in state_dict()"),
        ({"m": torch.ones(2, device="meta")}, "['m'] is a torch.Tensor, which cannot be saved; convert it to"),
        ({"o": np.array([None])}, "['o'] is a numpy.ndarray of dtype object, which cannot be saved in a checkpoint"),
        ({"d": defaultdict(lambda: 1)}, "['d'] is a defaultdict of "),
        ({torch.ones(1): 1}, " has a tensor as a key or a member of a set, which a copy cannot keep; use a name"),
        ({"s": {("a", torch.ones(1))}}, "['s'] has a tensor as a key or a member of a set"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_named_by_its_path(state: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(state, "callbacks[0].state")
    assert str(caught.value).startswith("callbacks[0].state" + message.replace("test_codec.", f"{__name__}."))


def test_a_key_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"^the key \(1, <built-in function len>\) of x\[1\] is a builtin_function"
    ):
        check({(1, len): 1}, "x")


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="is nested deeper than 64 levels, or contains itself"):
        encode(loop, "state")


def test_the_deepest_state_that_can_be_written_can_be_read() -> None:
    value: Any = torch.ones(1)
    for _ in range(63):
        value = {(1,): value}
    back = through_disk(value)
    for _ in range(63):
        back = back[(1,)]
    assert torch.equal(back, torch.ones(1))


TENSOR = {"@": "tensor", "name": "a"}


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"@": "tupel", "v": []}, "unknown type 'tupel'.*Did you mean 'tuple'"),
        ({"@": ["tuple"], "v": []}, "unknown type"),
        ({"@": "tuple"}, "malformed value of type 'tuple' \\(KeyError: 'v'\\)"),
        ({"@": "range", "v": [1, 2, 0]}, "malformed value of type 'range'"),
        ({"@": "dtype", "v": "load"}, "malformed value of type 'dtype'"),
        ({"@": "numpy", "dtype": "|O", "v": ""}, "malformed value of type 'numpy'"),
        ({"@": "array", "dtype": "|O", "shape": [1], "name": "a"}, "malformed value of type 'array'"),
        ({"@": "array", "dtype": "<f8", "shape": [99], "name": "a"}, "malformed value of type 'array'"),
        ({"@": "defaultdict", "factory": "eval", "v": []}, "malformed value of type 'defaultdict'"),
        ({"@": "set", "v": [[1]]}, "malformed value of type 'set'"),
        ({"@": "tensor", "name": "b"}, "the tensor 'b' is not in this checkpoint. Known: 'a'"),
        ({"@": "sparse_coo", "indices": TENSOR, "values": TENSOR, "size": [9]}, "malformed value of type 'sparse_coo'"),
        (deep(70), "nested deeper than 64 levels"),
    ],
)  # fmt: skip
def test_forged_state_is_refused(plain: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode(plain, {"a": torch.ones(8, dtype=torch.uint8)})
