"""Checkpoints on disk: whole or not there, verified, and never a reference to what trains on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import (
    delete,
    find,
    index,
    list_checkpoints,
    newest,
    read,
    streams,
    sweep,
    verify,
    write,
    write_index,
)
from loopwright.checkpoint.migrations import FORMAT
from loopwright.errors import CheckpointError


class Tied(nn.Module):
    """The embedding is also the output, as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("part", self.embed.weight.detach()[:2])


def make(name: str = "step-1", **info: object) -> Path:
    files = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}}
    state = {"seen": (1, 2), "optimizers": {"o": {"state": {0: {"m": torch.full((2, 3), 0.5)}}}}, "t": torch.zeros(4)}
    return write(Path("checkpoints") / name, files, state, info)


def test_a_checkpoint_is_a_folder_of_safetensors_and_json() -> None:
    path = make(step=1)
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["step-1"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["info"] == {"step": 1}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert (entry["size"], entry["blake2b"]) == (len(data), hashlib.blake2b(data, digest_size=32).hexdigest())
    assert set(safetensors.torch.load_file(path / "model.safetensors")) == {"w", "b"}
    assert set(safetensors.torch.load_file(path / "optimizer.safetensors")) == {"optimizers['o']['state'][0]['m']"}


def test_what_is_read_is_what_was_written() -> None:
    data = read(make(step=1, value=float("inf"), exact=["a reason"]))
    assert data.info == {"step": 1, "value": float("inf"), "exact": ["a reason"]}
    assert data.state["seen"] == (1, 2)
    assert torch.equal(data.state["optimizers"]["o"]["state"][0]["m"], torch.full((2, 3), 0.5))
    assert set(data.files) == {"model"}
    assert torch.equal(data.files["model"]["w"], torch.arange(6.0).reshape(2, 3))


def test_a_checkpoint_is_a_snapshot() -> None:
    weight = torch.ones(3)
    state = {"list": [1]}
    path = write(Path("c/a"), {"model": {"w": weight}}, state, {})
    weight.zero_()
    state["list"].append(2)
    assert torch.equal(read(path).files["model"]["w"], torch.ones(3))
    assert read(path).state == {"list": [1]}


def test_tied_and_overlapping_tensors_of_a_model_can_be_stored() -> None:
    net = Tied()
    path = write(Path("c/a"), {"model": net.state_dict()}, {}, {})
    data = read(path).files["model"]
    assert list(data) == ["part", "embed.weight", "out.weight"]
    assert data["out.weight"] is data["embed.weight"]
    again = Tied()
    again.load_state_dict(data)
    assert torch.equal(again.out.weight, net.embed.weight)
    assert torch.equal(again.part, net.part)
    assert len(safetensors.torch.load_file(path / "model.safetensors")) == 2  # once each on disk


def test_the_model_file_can_be_read_without_loopwright() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    path = write(Path("c/a"), {"model": net.state_dict()}, {}, {})
    again = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    safetensors.torch.load_model(again, path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    tied = Tied()
    del tied.part  # safetensors has no word for a part of another tensor
    path = write(Path("c/b"), {"model": tied.state_dict()}, {}, {})
    again = Tied()
    del again.part
    safetensors.torch.load_model(again, path / "model.safetensors")
    assert torch.equal(again.out.weight, tied.out.weight)


ALONE = """
import json, sys
from pathlib import Path
for name in ("loopwright", "torch"):
    sys.modules[name] = None  # an import of it fails
from safetensors.numpy import load_file
path = Path(sys.argv[1])
manifest, state = (json.loads((path / name).read_text()) for name in ("manifest.json", "state.json"))
info = manifest["info"]
tensors = {name: value.tolist() for name, value in load_file(path / "model.safetensors").items()}
moments = load_file(path / "optimizer.safetensors")
print(json.dumps([
    manifest["format"], sorted(manifest["files"]), info["step"], info["epoch"], tensors,
    sorted(value.shape for value in moments.values()),
]))
"""


@pytest.mark.capability("B-26")
def test_a_checkpoint_tells_what_it_is_without_the_framework_and_without_the_classes_of_its_user() -> None:
    """What a run has saved is safetensors and JSON with a format number, and is read with neither of us imported."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    run = lw.Trainer(epochs=2, progress=False).fit(task, [(torch.ones(4, 2), torch.ones(4, 1))] * 3)
    path = newest(run.folder / "checkpoints")  # type: ignore[operator]
    done = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    number, files, step, epoch, tensors, shapes = json.loads(done.stdout)
    assert (number, step, epoch) == (FORMAT, 6, 2)
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]
    assert tensors == {name: value.tolist() for name, value in net.state_dict().items()}
    assert shapes == [[1], [1, 3], [3], [3, 2]]


def test_models_without_tensors_and_names_of_any_kind_can_be_stored() -> None:
    files = {"model": {}, "model.a/b": {"w": torch.ones(1)}, "model.é ~": {"x.y": torch.zeros(1)}}
    data = read(write(Path("c/a"), files, None, {}))
    assert data.files["model"] == {}
    assert set(data.files) == set(files)
    assert data.state is None


def test_group_names_that_cannot_be_told_apart_are_refused() -> None:
    one = {"w": torch.ones(1)}
    for files, message in [
        ({"model.g": one, "model.G": one}, "the group 'model.G' differs from another in upper and lower case only"),
        ({".hidden": one}, "'.hidden' cannot name a group of tensors"),
        ({"": one}, "'' cannot name a group of tensors"),
        ({"optimizer": one}, "the group name 'optimizer' is used for the tensors of the state"),
        ({"optimizer-2": one}, "the group name 'optimizer-2' is used for the tensors of the state"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            write(Path("c/a"), files, {"optimizers": torch.ones(1)}, {})
    assert not Path("c").exists()


@pytest.mark.parametrize(("moments", "parts"), [(0, 0), (1, 1), (2, 2), (3, 3), (9, 4)])
def test_moments_come_in_files_about_as_large_as_the_weights(moments: int, parts: int) -> None:
    many = [torch.full((100_000,), float(i)) for i in range(12)]  # 4.8 MB
    state = {i: {"step": torch.tensor(7.0), **{f"m{k}": t + k for k in range(moments)}} for i, t in enumerate(many)}
    path = write(Path("c/a"), {"model": dict(zip("abcdefghijkl", many, strict=True))}, {"optimizers": state}, {})
    sizes = [file.stat().st_size for file in sorted(path.glob("optimizer*"))]
    assert len(sizes) == max(1, parts)
    assert [file.name for file in path.glob("model*")] == ["model.safetensors"]
    if parts > 1:
        assert max(sizes) - min(sizes) < 1_000_000
    found = read(path).state["optimizers"]
    assert all(torch.equal(found[i][name], t) for i, values in state.items() for name, t in values.items())
    assert verify(path)["files"].keys() == {file.name for file in path.iterdir()} - {"manifest.json"}


def test_the_next_file_is_written_while_the_digest_of_the_one_before_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, seen = threading.Event(), list[bool]()

    class Waits:
        def update(self, data: memoryview) -> None:
            seen.append(written.wait(3))

    monkeypatch.setattr(streams, "new_hash", Waits)
    large, small = memoryview(bytes(streams._THREAD)), memoryview(bytes(1))
    with streams.Writer(tmp_path) as out, out.hashing():
        for name in ("one", "two"):
            out.write(name, [(small, True), (large, False), (small, True)], size=len(large) + 2)
        written.set()
    assert seen == [True] * 6


def test_the_manifest_takes_no_tensors() -> None:
    with pytest.raises(CheckpointError, match=r"info\['loss'\] is a tensor; use float"):
        make(loss=torch.ones(()))


def test_a_checkpoint_of_the_same_name_is_replaced() -> None:
    path = make(step=1)
    assert make(step=2) == path
    assert read(path).info == {"step": 2}
    assert [p.name for p in path.parent.iterdir()] == ["step-1"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_nothing_else_is_ever_replaced(what: str) -> None:
    place = Path("checkpoints/step-1")
    place.parent.mkdir()
    place.write_text("mine") if what == "file" else place.mkdir()
    with pytest.raises(CheckpointError, match="checkpoints/step-1 exists and is not a checkpoint"):
        make()
    assert place.read_text() == "mine" if what == "file" else place.is_dir()


def test_an_unknown_type_leaves_nothing_behind() -> None:
    with pytest.raises(CheckpointError, match=r"^x\[1\] is an object"):
        write(Path("c/a"), {}, {"x": [1, object()]}, {})
    assert not Path("c").exists()


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failure_of_the_disk_leaves_the_older_checkpoint(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(step=1)
    calls = 0
    genuine = getattr(os, call)

    def fail(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (2 if call == "rename" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*args, **kwargs)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        CheckpointError, match=r"could not be written: .*No space left on device.* Older ones are untouched"
    ):
        make(step=2)
    monkeypatch.undo()
    assert read(path).info == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["step-1"]


def test_everything_is_synced_before_it_gets_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else str(handle)
        events.append("sync " + re.sub(r"\.step-1\.\w+\.writing", "TEMP", name).rpartition("checkpoints")[2])
        fsync(handle)

    def note_rename(a: Path, b: Path) -> None:
        events.append(f"rename to {b.name}")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    make()
    files = ["model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json", "manifest.json"]
    assert sorted(events[1:-2]) == sorted(["sync /TEMP", *(f"sync /TEMP/{file}" for file in files)])
    assert events[-2:] == ["rename to step-1", "sync "]  # the first is the folder above the new folder of checkpoints


# ------------------------------------------------------------------------------------------------ damage


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json", "manifest.json"]
)
def test_any_flipped_bit_is_found_and_its_file_named(name: str) -> None:
    path = make(step=1)
    file = path / name
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            file.write_bytes(bad)
            with pytest.raises(CheckpointError) as caught:
                read(path)
            assert f"{path / name} " in str(caught.value) or name == "manifest.json", (position, bit)
    file.write_bytes(good)
    assert read(path).info == {"step": 1}


def test_a_damaged_file_is_named_with_both_checksums_and_a_good_checkpoint() -> None:
    old, new = make("step-1", step=1), make("step-2", step=2)
    file = new / "model.safetensors"
    data = bytearray(file.read_bytes())
    expected = hashlib.blake2b(data, digest_size=32).hexdigest()
    data[-1] ^= 1
    file.write_bytes(data)
    found = hashlib.blake2b(data, digest_size=32).hexdigest()
    with pytest.raises(CheckpointError) as caught:
        read(new)
    assert str(caught.value) == (
        f"{file} is damaged: its blake2b is {found}, and the manifest says {expected}. "
        f"The newest good checkpoint beside it is {old}"
    )


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_cut_file_is_found(name: str, keep: float) -> None:
    path = make()
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(keep) if keep == 1 else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read(path)


def test_a_missing_file_is_named() -> None:
    path = make()
    (path / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoints/step-1/state.json cannot be read: No such file or directory"
    ):
        verify(path)


def test_a_folder_without_a_manifest_is_not_a_checkpoint() -> None:
    path = make()
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"^checkpoints/step-1 is not a checkpoint: it has no manifest.json$"):
        read(path)
    with pytest.raises(CheckpointError, match=r"^nowhere is not a checkpoint: it does not exist$"):
        read("nowhere")
    assert list_checkpoints("checkpoints") == []


def forge(path: Path, **changes: object) -> None:
    """A manifest with a right checksum, as somebody who means harm would write it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["checksum"]
    text = json.dumps(manifest, sort_keys=True).encode()
    (path / "manifest.json").write_text(json.dumps({"checksum": hashlib.sha256(text).hexdigest(), **manifest}))


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "a/b.json", "weights.pt", "..", "", "x.json\0"])
def test_a_forged_manifest_cannot_name_other_files(name: str) -> None:
    path = make()
    forge(path, files={name: {"size": 1, "blake2b": "0" * 64, "group": "model"}})
    with pytest.raises(CheckpointError, match="names a file that no checkpoint has"):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []}, {"files": {"state.json": 1}}, {"files": {}}, {"info": {"@": "eval", "v": "1"}},
        {"files": {"model.safetensors": {"size": 1, "blake2b": 5}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_manifest_is_an_error_and_nothing_worse(changes: dict[str, object]) -> None:
    path = make()
    forge(path, **changes)
    with pytest.raises(CheckpointError):
        read(path)


@pytest.mark.parametrize("text", ["[1", "[]", "null", "[" * 100_000, '{"checksum": null}'])
def test_a_manifest_that_is_none_is_an_error(text: str) -> None:
    path = make()
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        read(path)


@pytest.mark.parametrize(
    "detail", [{"dtype": "load", "shape": [1]}, {"dtype": "float64", "shape": [99]}, {"stride": [9, 9]}]
)
def test_forged_notes_on_tensors_are_refused(detail: dict[str, object]) -> None:
    path = make()
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["model.safetensors"]["tensors"] = {"w": detail}
    forge(path, files=files)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as tensors"):
        read(path)


def test_a_newer_format_is_named() -> None:
    path = make()
    forge(path, format=2)
    with pytest.raises(CheckpointError, match="has format 2, and this version of Loopwright reads format 1"):
        read(path)


# ------------------------------------------------------------------------------------------------ the folder


def test_checkpoints_are_listed_as_written() -> None:
    paths = [make(name) for name in ("step-9", "step-10", "step-2")]
    assert list_checkpoints("checkpoints") == paths
    assert newest("checkpoints") == paths[-1]
    assert newest("nowhere") is None
    make("step-9")  # after a resume from an older one
    assert newest("checkpoints") == paths[0]


def test_a_run_folder_means_its_newest_checkpoint() -> None:
    path = write(Path("runs/a/checkpoints/step-1"), {}, {}, {})
    assert find("runs/a") == find("runs/a/checkpoints") == find(path) == path
    with pytest.raises(
        CheckpointError, match=r"^runs is not a checkpoint: it has no manifest.json, and no checkpoints"
    ):
        find("runs")
    write(Path("runs/digits/20260102-000000-1a/checkpoints/step-1"), {}, {}, {})
    write(Path("runs/digits/20260101-000000-2b/checkpoints/step-1"), {}, {}, {})
    with pytest.raises(CheckpointError, match=r"of a checkpoint: the newest in it is runs/digits/20260102-000000-1a$"):
        find("runs/digits")
    with pytest.raises(CheckpointError, match=r"^gone is not a checkpoint: it does not exist"):
        find("gone")


def test_the_index_is_rebuilt_from_the_manifests() -> None:
    folder = Path("checkpoints")
    assert index(folder) == {"last": None, "best": None}
    a = make("a", value=0.5, monitor="valid/f1", mode="max")
    b = make("b", value=0.9, monitor="valid/f1", mode="max")
    c = make("c", value=float("nan"), monitor="valid/f1", mode="max")
    assert index(folder) == {"last": c, "best": b}
    write_index(folder, last=c, best=a)
    assert index(folder) == {"last": c, "best": a}
    delete(a)
    assert index(folder) == {"last": c, "best": b}
    for text in ("", "{", '{"last": "../../x", "best": null}', '{"last": 3}', "[]"):
        (folder / "index.json").write_text(text)
        assert index(folder) == {"last": c, "best": b}


def test_delete_removes_checkpoints_and_nothing_else() -> None:
    path = make()
    delete(path)
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no manifest.json; nothing was deleted"):
        delete(path)
    assert path.is_dir()


def test_sweep_takes_what_killed_processes_left_and_nothing_else() -> None:
    path = make()
    folder = path.parent
    for name in (".step-2.0123abcd.writing", ".step-3.0123abcd.deleted", ".step-1.0123abcd.replaced"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("half")
    for name in (".git", "notes", ".step-2.writing", ".step-2.0123abcd.other"):
        (folder / name).mkdir()
    swept = sweep(folder)
    assert [p.name for p in swept] == [
        ".step-1.0123abcd.replaced", ".step-2.0123abcd.writing", ".step-3.0123abcd.deleted",
    ]  # fmt: skip
    assert names(folder) == [".git", ".step-2.0123abcd.other", ".step-2.writing", "notes", "step-1"]
    assert sweep("nowhere") == []


def test_sweep_puts_back_what_was_to_be_replaced() -> None:
    path = make(step=1)
    os.rename(path, path.with_name(".step-1.0123abcd.replaced"))
    sweep(path.parent)
    assert read(path).info == {"step": 1}
