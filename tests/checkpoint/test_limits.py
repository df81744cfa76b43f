"""A checkpoint that somebody forged, checksums and all: a CheckpointError, before memory or time is given away."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.checkpoint import index, list_checkpoints, newest, read, verify, write
from loopwright.checkpoint.shelf import monitored
from loopwright.errors import CheckpointError

TAGS = [
    "int", "float", "tuple", "dict", "OrderedDict", "Counter", "defaultdict", "deque", "set", "frozenset", "bytes",
    "complex", "range", "array", "numpy", "path", "Size", "dtype", "device", "tensor", "sparse_coo",
]  # fmt: skip
FIELDS = ["v", "name", "shape", "dtype", "size", "indices", "values", "factory", "maxlen"]
odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8),
    st.sampled_from([2**63, 10**400, -1, "t", "a", "<U9", "<f4", "O", "0x" + "f" * 99, "inf", "float32", "cuda:1"]),
)  # fmt: skip
trees = st.recursive(
    odd,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*FIELDS, "x"]), inner, max_size=4),
        st.builds(lambda tag, rest: {"@": tag, **rest}, st.sampled_from(TAGS),
                  st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)),
    ),
    max_leaves=12,
)  # fmt: skip


def make() -> Path:
    files = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}}
    state = {"t": torch.zeros(4), "a": torch.arange(4).numpy()}
    path = write(f"checkpoints/{os.urandom(4).hex()}", files, state, {"step": 1})
    assert isinstance(path, Path)
    return path


def forge(path: Path, changes: dict[str, Any] | None = None) -> None:
    """Make sizes and checksums right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry |= {"size": len(data), "blake2b": hashlib.blake2b(data, digest_size=32).hexdigest()}
    manifest |= changes or {}
    del manifest["checksum"]
    text = json.dumps(manifest, sort_keys=True).encode()
    (path / "manifest.json").write_text(json.dumps({"checksum": hashlib.sha256(text).hexdigest(), **manifest}))


def with_header(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> None:
    length = len(header) if length is None else length
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    forge(path)


def read_or_refuse(path: Path) -> None:
    with suppress(CheckpointError):
        read(path)


@settings(max_examples=60)
@given(trees)
def test_any_state_is_read_or_refused(tree: Any) -> None:
    path = make()
    (path / "state.json").write_text(json.dumps(tree))
    forge(path)
    read_or_refuse(path)


@settings(max_examples=40)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    path = make()
    for file in ("state.json", "model.safetensors"):
        with_good = (path / file).read_bytes()
        (path / file).write_bytes(data)
        forge(path)
        read_or_refuse(path)
        (path / file).write_bytes(with_good)
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        read(path)
    assert path in list_checkpoints(path.parent)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "BF16", "F4", 3, None]),
        "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=3), odd, st.just([2**40, 2**40]), st.just([0, 2**62])),
        "data_offsets": st.one_of(st.lists(st.integers(-4, 24), max_size=3), odd),
    },
)


@settings(max_examples=80)
@given(st.dictionaries(st.text(max_size=3), st.one_of(entries, odd), max_size=3), st.integers(0, 24))
def test_any_header_of_tensors_is_read_or_refused(header: Any, size: int) -> None:
    path = make()
    with_header(path, json.dumps(header).encode(), bytes(size))
    read_or_refuse(path)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(["format", "order", "info", "files", "x"]), trees, max_size=3))
def test_any_manifest_is_read_or_refused_and_listed(changes: Any) -> None:
    path = make()
    forge(path, changes)
    read_or_refuse(path)
    with suppress(CheckpointError):
        verify(path)
    newest(path.parent), index(path.parent), monitored(path)


@settings(max_examples=40)
@given(trees)
def test_any_notes_on_tensors_are_read_or_refused(tree: Any) -> None:
    path = make()
    files = json.loads((path / "manifest.json").read_text())["files"]
    for key, value in (("tensors", tree), ("aliases", tree), ("tensors", {"w": tree}), ("aliases", {"x": tree})):
        files["model.safetensors"][key] = value
        forge(path, {"files": files})
        read_or_refuse(path)
        del files["model.safetensors"][key]


W = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        ({"w": W}, 2**63, "a header of 9,223,372,036,854,775,808 bytes in a file of"),
        ({"w": W}, 0, "a header of 0 bytes in a file of"),
        ({"w": W | {"shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}, None, "the header describes"),
        ({"w": W | {"shape": [2**62]}}, None, "lies at 0 to 24, and 0 is where it begins"),
        ({"w": W | {"shape": [1] * 99 + [6]}}, None, "at most 64 dimensions"),
        ({"w": W | {"shape": [-2, -3]}}, None, "a shape of [-2, -3]"),
        ({"w": W, "v": W}, None, "lies at 0 to 24, and 24 is where it begins"),
        ({"w": W, "v": W | {"data_offsets": [20, 44]}}, None, "lies at 20 to 44, and 24 is where it begins"),
        ({"w": W | {"data_offsets": [4, 28]}}, None, "lies at 4 to 28, and 0 is where it begins"),
        ({"w": W | {"data_offsets": [0, 24.0]}}, None, "'w' lies at [0, 24.0]"),
        ({}, None, "the header describes 0 bytes, and 24 follow it"),
        ({"w": W | {"dtype": "PICKLE"}}, None, "KeyError: 'PICKLE'"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(header: Any, length: int | None, message: str) -> None:
    path = make()
    with_header(path, json.dumps(header).encode(), bytes(24), length=length)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{path / 'model.safetensors'} cannot be read as tensors" in str(caught.value)
    assert message in str(caught.value)
    assert peak < 20e6


def test_an_array_is_not_unfolded_again_and_again() -> None:
    path = make()
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({"a": state["a"], "again": [state["a"]] * 3}))
    forge(path)
    with pytest.raises(CheckpointError, match=r"the tensor 'a' is not in this checkpoint"):
        read(path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "1" * 1_000_000, '"' + "\\u0000" * 10])
def test_json_that_is_a_bomb_is_refused(text: str) -> None:
    path = make()
    (path / "state.json").write_text(text)
    forge(path)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read as JSON"):
        read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(file: str) -> None:
    path = make()
    (path / file).unlink()
    os.mkfifo(path / file)
    with pytest.raises(CheckpointError, match="it has no manifest.json" if file == "manifest.json" else "not a file"):
        read(path)


def test_state_that_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwright.checkpoint.store._STATE_SIZE", 100)
    with pytest.raises(CheckpointError, match=r"the state has 2\d\d bytes besides its tensors, and at most 100 can be"):
        write("checkpoints/a", {}, {"history": ["ten bytes"] * 20}, {})
    assert not Path("checkpoints").exists()
