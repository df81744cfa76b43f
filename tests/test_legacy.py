"""``import-legacy``: weights of other programs come over, and nothing in their files is executed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gadgets import MARK, gadgets, opcodes, torch_old, torch_tar, torch_zip, zipped_twice
from loopwright import legacy
from loopwright.checkpoint import read, write
from loopwright.cli import main
from loopwright.errors import CheckpointError
from loopwright.legacy import import_legacy
from tiny import classifier


def lightning(net: nn.Module, **more: Any) -> dict[str, Any]:
    """What Lightning 2 writes: the module as ``self.model``, a loss with weights of its own, and all that it adds."""
    optimizer = torch.optim.Adam(net.parameters())
    return {
        "epoch": 3, "global_step": 120, "pytorch-lightning_version": "2.6.6",
        "state_dict": {**{f"model.{k}": v for k, v in net.state_dict().items()}, "loss.weight": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "layers": [8, 8], "name": "net"}, **more,
    }  # fmt: skip


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_thing_is_counted_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"lr": 1}}, "theirs.ckpt")
    assert main(["import-legacy", "theirs.ckpt", "ours/net"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "ours/net: 1 tensor from 'state_dict', 8 B",
        "also kept: 1 setting",
    ]


def test_a_checkpoint_of_lightning_becomes_one_of_the_plain_module(capsys: pytest.CaptureFixture[str]) -> None:
    net = classifier(batch_norm=True)
    torch.save(lightning(net), "theirs.ckpt")
    assert main(["import-legacy", "theirs.ckpt", "ours/net", "--prefix", "model."]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ours/net: 9 tensors from 'state_dict', 436 B",
        "also kept: epoch 3, step 120, 3 settings",
        "left out: callbacks, hparams_name, loops, lr_schedulers, optimizer_states, pytorch-lightning_version",
        "left out: names that do not begin with 'model.' (1)",
        "To use it: model.load_state_dict(loopwright.checkpoint.read('ours/net').files['model'])",
    ]
    data = read("ours/net")
    assert same(data.files["model"], net.state_dict())
    classifier(batch_norm=True, seed=9).load_state_dict(data.files["model"])
    assert (data.info["epoch"], data.info["step"]) == (3, 120)
    assert data.info["settings"] == {"lr": 1e-3, "layers": [8, 8], "name": "net"}
    assert data.info["exact"] == ["it was imported from theirs.ckpt, and holds weights only"]
    assert sorted(p.name for p in Path().iterdir()) == ["ours", "theirs.ckpt"]
    assert main(["checkpoints", "show", "ours/net"]) == 0
    text = capsys.readouterr().out
    assert "layers: [8, 8]" in text
    assert "it was imported from theirs.ckpt" in text


def test_nothing_is_ever_replaced_or_taken_from_nowhere() -> None:
    torch.save({}, "a.pt")
    write("there", {}, {}, {})
    Path("folder").mkdir()
    for source, dest, message in [
        ("a.pt", "there", "there exists; nothing was written"), ("a.pt", "a.pt", "a.pt exists; nothing was written"),
        ("b.pt", "new", "b.pt does not exist"), ("folder", "new", "folder is not a file"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            import_legacy(source, dest)


# ------------------------------------------------- what the process of its own does, called here to be quick


def convert(source: str, *, key: str | None = None, prefix: str = "") -> Any:
    made = Path(f"made-{len(list(Path().iterdir()))}")
    legacy._convert(Path(source), made, key=key, prefix=prefix)
    return read(made)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_plain_state_dict_keeps_its_names(new: bool) -> None:
    net = classifier()
    torch.save(net.state_dict(), "w.pth", _use_new_zipfile_serialization=new)
    data = convert("w.pth")
    assert same(data.files["model"], net.state_dict())
    assert data.info["left_out"] == []
    assert (data.info["epoch"], data.info["step"], data.info["settings"]) == (None, None, {})


def test_safetensors_come_over_with_what_is_tied() -> None:
    net = nn.Module()
    net.a, net.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    net.b.weight = net.a.weight
    safetensors.torch.save_model(net, "w.safetensors")
    data = convert("w.safetensors")
    assert same(data.files["model"], net.state_dict())
    assert data.files["model"]["a.weight"] is data.files["model"]["b.weight"]


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module", "whatever"])
def test_weights_are_found_where_programs_put_them(name: str) -> None:
    torch.save({name: {"w": torch.ones(2)}, "optimizer": {"state": {}}, "epoch": 1, "args": {"lr": 1}}, "w.pt")
    data = convert("w.pt")
    assert list(data.files["model"]) == ["w"]
    assert (data.info["epoch"], data.info["settings"], data.info["left_out"]) == (1, {"lr": 1}, ["optimizer"])


def test_a_key_says_where_they_are_also_when_nested() -> None:
    torch.save({"gen": {"net": {"w": torch.ones(1)}}, "disc.net": {"w": torch.zeros(1)}, "n": 3}, "w.pt")
    assert convert("w.pt", key="gen.net").files["model"]["w"] == 1
    assert convert("w.pt", key="disc.net").files["model"]["w"] == 0
    for key, message in [
        ("gan", r"w.pt has no 'gan'. Known: 'disc.net', 'gen', 'n'. Did you mean 'gen'\?"),
        ("gen.nat", r"w.pt has no 'gen.nat'. Known: 'net'. Did you mean 'net'\?"),
        ("n", "'n' in w.pt is an int, and not a dict of tensors by name"),
        ("gen", "'gen' in w.pt is a dict, and not a dict of tensors by name"),
        ("n.x", "w.pt has no 'n.x'. Known: none."),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert("w.pt", key=key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "weights in several places: 'a', 'b'. Say where"),
        ({"epoch": 1}, "no weights, but a dict of 'epoch'. Say where they are: --key NAME"),
        ([torch.ones(1)], "no weights, but list"), (torch.ones(1), "no weights, but Tensor"), ({}, "no weights"),
    ],
)  # fmt: skip
def test_where_no_weights_are_found_it_says_what_is_there(content: Any, message: str) -> None:
    torch.save(content, "w.pt")
    with pytest.raises(CheckpointError, match=message):
        convert("w.pt")


def test_a_prefix_that_no_name_has_is_an_error() -> None:
    torch.save({"module.w": torch.ones(1), "other.w": torch.ones(1)}, "w.pt")
    with pytest.raises(CheckpointError, match=r"begins with --prefix 'model.'. Known: 'module.', 'other.'"):
        convert("w.pt", prefix="model.")


def test_what_is_no_dense_tensor_keeps_its_meaning_or_is_refused() -> None:
    sparse = torch.eye(3).to_sparse()
    torch.save({"w": torch.ones(2), "s": sparse, "bn._extra_state": {"n": 1}}, "w.pt")
    data = convert("w.pt")
    assert list(data.files["model"]) == ["w"]
    extras = data.state["models"]["model"]
    assert torch.equal(extras["s"].to_dense(), torch.eye(3))
    assert extras["bn._extra_state"] == {"n": 1}
    torch.save({"w": torch.ones(2, device="meta")}, "meta.pt")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        convert("meta.pt")


def test_settings_that_are_not_plain_are_left_out() -> None:
    torch.save(lightning(classifier(), hyper_parameters={"weights": torch.ones(2)}), "w.ckpt")
    data = convert("w.ckpt")
    assert data.info["settings"] == {}
    assert "hyper_parameters" in data.info["left_out"]


# ---------------------------------------------------------------------------------------------- bad intent


class Evil:
    """What a program would pickle that means harm."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


def test_a_whole_module_or_a_class_of_somebody_is_refused_by_its_name() -> None:
    torch.save(classifier(), "w.pt")
    with pytest.raises(CheckpointError) as caught:
        convert("w.pt")
    assert str(caught.value) == (
        "w.pt asks for torch.nn.modules.container.Sequential, which is neither a tensor nor plain data. It may be "
        "code, so it was not read, and nothing was executed. If you trust the file, save the weights alone with the "
        "program that wrote it: torch.save(model.state_dict(), 'weights.pt')"
    )


@pytest.mark.parametrize("forced", ["1", pytest.param("0", marks=pytest.mark.nightly)])
def test_code_in_a_pickle_is_never_called_whatever_the_environment_says(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, as a user goes it; torch knows a variable that turns its own safety off."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"state_dict": {"w": torch.ones(1), "x": Evil()}}, "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil.ckpt asks for posix.system, which is neither a tensor nor plain"):
        import_legacy("evil.ckpt", "ours")
    assert sorted(p.name for p in Path().iterdir()) == ["evil.ckpt"]


@pytest.mark.parametrize(("name", "data"), gadgets(), ids=[name for name, _ in gadgets()])
def test_no_gadget_is_executed(name: str, data: bytes) -> None:
    Path("evil.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^evil.pt (asks for|is not what torch.save or safetensors writes)"):
        convert("evil.pt")
    assert [p.name for p in Path().iterdir()] == ["evil.pt"], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [torch_zip, *(pytest.param(w, marks=pytest.mark.nightly) for w in (bytes, torch_old, torch_tar, zipped_twice))],
    ids=lambda w: w.__name__,
)
@pytest.mark.parametrize(
    "call", ["os.system", *(pytest.param(c, marks=pytest.mark.nightly) for c in ("builtins.exec", "subprocess.Popen"))]
)
def test_no_gadget_is_executed_in_the_process_of_its_own(wrap: Any, call: str) -> None:
    arguments = (f"touch {MARK}",) if call == "os.system" else (f"open({MARK!r}, 'w')",)
    Path("evil.pt").write_bytes(wrap(opcodes(call, arguments)))
    with pytest.raises(CheckpointError, match=r"^evil.pt (asks for|is not what)"):
        import_legacy("evil.pt", "ours")
    assert [p.name for p in Path().iterdir()] == ["evil.pt"]


def test_this_process_opens_no_pickle() -> None:
    """The main process would see torch, and pickles opened by it, in its audit events."""
    torch.save({"w": torch.ones(1)}, "w.pt")
    code = (
        "import sys, loopwright.legacy as legacy, torch\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event == 'pickle.find_class' else None)\n"
        "torch.load = None\n"
        "legacy.import_legacy('w.pt', 'ours')\n"
        "assert not seen, seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(read("ours").files["model"]["w"], torch.ones(1))


@pytest.mark.nightly
def test_a_module_in_the_working_directory_is_not_imported() -> None:
    torch.save({"w": torch.ones(1)}, "w.pt")
    for name in ("torch", "json", "zipfile", "numpy", "loopwright", "sitecustomize"):
        Path(f"{name}.py").write_text(f"open({MARK!r}, 'w')")
    import_legacy("w.pt", "ours")
    assert not Path(MARK).exists()


@pytest.mark.parametrize("data", [b"", b"junk", b"\x80", b"PK\x03\x04", bytes(1000), b"\x80\x04" + b"(" * 10_000])
def test_what_is_no_such_file_is_an_error(data: bytes) -> None:
    Path("w.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^w.pt (is not what torch.save or safetensors writes|asks for)"):
        convert("w.pt")


def tarball() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"net/{name}", "3")
    return buffer.getvalue()


SAVE = "save the weights alone with the program that wrote it: torch.save(model.state_dict(), 'weights.pt')"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"this is junk", "w.pt is not what torch.save or safetensors writes, or it is damaged"),
        (b"<html>please log in</html>", "w.pt is not what torch.save or safetensors writes, or it is damaged "
                                        "(UnpicklingError: Unsupported operand 60)"),
        *((data, "w.pt is not what torch.save or safetensors writes, or it is damaged (it reads as a .tar file, as "
                 "torch wrote them before 0.1.10; they may hold code, and are not opened)")
          for data in (tarball(), bytes(1000))),
        (script(), "w.pt is a TorchScript archive, or looks like one. It may hold code, so it was not read; "
                   f"{SAVE}"),
    ],
    ids=["junk", "page", "tar", "zeros", "script"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
def test_nobody_is_advised_to_let_a_file_execute_code(data: bytes, message: str) -> None:
    """torch's own words say how to load it without a check, and that it will likely succeed."""
    Path("w.pt").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        convert("w.pt")
    text = str(caught.value)
    assert text.startswith(message)
    assert not re.search("weights_only|torch.load|Re-running|safe_globals", text)


@pytest.mark.parametrize("error", [
    ValueError("Weights only load failed. In 2.6 ... Re-running `torch.load` with `weights_only` ..."),
    RuntimeError("Cannot use ``weights_only=True`` with what comes next. Re-running `torch.load` ..."),
])  # fmt: skip
def test_advice_of_a_later_torch_is_not_repeated_either(error: Exception) -> None:
    assert legacy._refusal(Path("w.pt"), error) == (
        f"w.pt is not what torch.save or safetensors writes, or it is damaged ({type(error).__name__})"
    )


@pytest.mark.nightly
def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 22)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile("w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert Path("w.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"w.pt has .* bytes and would unpack to 16,.*, more than 100 times"):
        import_legacy("w.pt", "ours")


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of memory are those of Linux")
def test_a_tensor_larger_than_its_file_ends_the_other_process_and_not_this_one() -> None:
    """One number, expanded to 2**29 of them: 2 GB once it is written."""
    torch.save({"w": torch.ones(1).expand(1 << 29)}, "w.pt")
    assert Path("w.pt").stat().st_size < 5000
    with pytest.raises(CheckpointError, match=r"^w.pt asks for more memory than a file of its size can need; refused$"):
        import_legacy("w.pt", "ours")
    assert [p.name for p in Path().iterdir()] == ["w.pt"]
