"""Checkpoints behind a URL: one exists when its manifest does, from the first byte to the last."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import loopwright as lw
from loopwright.checkpoint import delete, find, index, list_checkpoints, newest, read, sweep, verify, write
from loopwright.checkpoint.places import Remote, as_place
from loopwright.errors import CheckpointError, SettingError
from tiny import loader, sgd_task, trainer

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def make(step: int, filled: float = 0.0, /, **info: Any) -> Any:
    files = {"model": {"w": torch.full((300, 300), filled)}}
    state = {"optimizers": {"m": torch.full((3,), filled)}, "n": step}
    return write(f"{URL}/step-{step:08d}", files, state, {"step": step, **info})


def test_it_is_written_listed_found_read_verified_and_deleted_as_a_local_one() -> None:
    first, second = make(1, 1.0, monitor="loss", mode="min", value=0.5), make(2, 2.0)
    assert str(first) == "memory:///bucket/run/step-00000001"
    assert list_checkpoints(URL) == [first, second]
    assert newest(URL) == find(URL) == find(str(second)) == second
    assert index(URL) == {"last": second, "best": first}
    data = read(f"{URL}/step-00000001")
    assert torch.equal(data.files["model"]["w"], torch.ones(300, 300))
    assert (data.state["n"], data.info["step"]) == (1, 1)
    verify(second)
    delete(f"{URL}/step-00000001")
    assert list_checkpoints(URL) == [second]
    assert sweep(URL) == []
    with pytest.raises(CheckpointError, match=r"^memory:///bucket/run/step-00000001 is not a checkpoint: it does not"):
        read(first)


def test_a_damaged_file_is_named_and_another_checkpoint_offered(store: MemoryFileSystem) -> None:
    first, second = make(1), make(2)
    for name in ("model.safetensors", "state.json", "manifest.json"):
        good = store.cat_file(f"/bucket/run/step-00000002/{name}")
        store.pipe_file(f"/bucket/run/step-00000002/{name}", good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
        with pytest.raises(CheckpointError) as caught:
            read(second)
        assert f"{second}/{name} is damaged" in str(caught.value)
        assert str(caught.value).endswith(f"The newest good checkpoint beside it is {first}")
        store.pipe_file(f"/bucket/run/step-00000002/{name}", good)
    read(second)


class Operations:
    """Stops a store in front of its n-th change, as the end of the process or as an error of the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, left: int, forever: bool) -> None:
        self.left, self.seen, self.forever = left, 0, forever
        for name in ("open", "pipe_file", "rm", "rm_file"):
            monkeypatch.setattr(MemoryFileSystem, name, self.stopping(getattr(MemoryFileSystem, name)))

    def stopping(self, genuine: Any) -> Any:
        def call(fs: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            if args[:1] != ("rb",) and kwargs.get("mode") != "rb":
                self.seen += 1
                if self.seen == self.left or (self.forever and self.seen > self.left):
                    raise OSError(errno.EIO, "the network is down")
            return genuine(fs, path, *args, **kwargs)

        return call


@pytest.mark.parametrize("forever", [False, True], ids=["one error", "the process ends"])
@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "a new one"])
def test_whenever_a_write_breaks_off_the_older_checkpoint_is_there_and_the_rest_can_be_swept(
    step: int, forever: bool, store: MemoryFileSystem
) -> None:
    store.mkdirs("/bucket")
    for left in range(1, 99):
        store.rm("/bucket", recursive=True)
        first = make(1, 1.0)
        before = sorted(store.find("/bucket"))
        with pytest.MonkeyPatch.context() as patched:
            operations = Operations(patched, left=left, forever=forever)
            whole = operations.seen
            with suppress(CheckpointError):
                make(step, 2.0)
                whole = operations.seen
            if whole and operations.seen < left:
                break
        there = newest(URL)
        assert there is not None
        assert float(read(there).files["model"]["w"][0, 0]) in (1.0, 2.0)
        assert first in list_checkpoints(URL)
        sweep(URL)
        names = {name.rpartition("/")[2].partition("~")[0].partition(".")[0] for name in store.find("/bucket")}
        assert names == {"manifest", "model", "optimizer", "state"}
        assert len(store.find("/bucket")) == len(before) * len(list_checkpoints(URL))
    assert left > 6


def test_sweeping_touches_only_what_a_write_has_marked(store: MemoryFileSystem) -> None:
    store.pipe_file("/bucket/run/mine/model.safetensors", b"mine")
    store.pipe_file("/bucket/run/step-00000009/.unfinished", b"")
    store.pipe_file("/bucket/run/step-00000009/model.safetensors", b"half")
    make(1)
    assert sweep(URL) == [as_place(f"{URL}/step-00000009")]
    assert store.exists("/bucket/run/mine/model.safetensors")
    assert not store.exists("/bucket/run/step-00000009")
    with pytest.raises(CheckpointError, match=r"run/mine exists and is not a checkpoint"):
        write(f"{URL}/mine", {}, {}, {})


@pytest.mark.parametrize("background", [False, True])
def test_a_run_keeps_its_checkpoints_there(background: bool) -> None:
    saver = lw.Checkpoint("2 steps", folder=URL, async_save=background)
    net = torch.nn.Linear(5, 3)
    task = sgd_task(net, lr=0.1)
    run = trainer(epochs=1, folder="runs", checkpoint=saver, loggers=[]).fit(task, loader(24, batch_size=4))
    saver.finish(run)
    assert [path.name for path in list_checkpoints(URL)] == ["step-00000004", "step-00000006"]
    assert torch.equal(read(URL + "/step-00000006").files["model"]["weight"], net.weight)
    assert index(URL)["last"] == saver.last == newest(URL)
    other = lw.Checkpoint(folder=URL)
    run.progress = run.progress._replace(step=0)
    with pytest.raises(SettingError) as caught:
        other.start(run)
    assert str(caught.value) == (
        "Checkpoint(folder='memory://bucket/run') holds the checkpoints of another run, such as "
        "memory:///bucket/run/step-00000006. Go on with that run: fit(..., resume='memory://bucket/run'), or name "
        "another folder"
    )


def test_a_url_of_this_machine_is_a_folder(tmp_path: Path) -> None:
    assert as_place(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert isinstance(write(f"file://{tmp_path}/c/step-1", {}, {"n": 1}, {}), Path)
    assert read(tmp_path / "c" / "step-1").state == {"n": 1}


def test_what_cannot_be_reached_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"nosuch://a/b cannot be opened: .*nosuch"):
        as_place("nosuch://a/b")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fsspec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SettingError) as caught:
        as_place("s3://a/b")
    assert str(caught.value) == "s3://a/b is a URL, which needs fsspec: pip install 'loopwright[remote]'"


def test_places_behind_urls_compare_by_their_url() -> None:
    place = as_place("memory://a/b")
    assert isinstance(place, Remote)
    assert {place, as_place("memory://a/b/")} == {place}
    assert place != as_place("memory://a/c")
    assert (place / "c").parent == place
