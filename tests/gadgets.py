"""Pickles that run code when they are opened, in the many ways that are known, each of which would leave a mark."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import torch

MARK = "executed"  # the file, or folder, that code of a gadget makes in the working directory
_CODE = f"open({MARK!r}, 'w').close()"
_SHELL = f"touch {MARK}"

# what a pickle asks to be called, by name, and with what
CALLS: dict[str, tuple[Any, ...]] = {
    "os.system": (_SHELL,),
    "posix.system": (_SHELL,),
    "os.popen": (_SHELL,),
    "os.mkdir": (MARK,),
    "os.makedirs": (MARK,),
    "os.execv": ("/bin/touch", ["touch", MARK]),
    "os.spawnv": (0, "/bin/touch", ["touch", MARK]),
    "posix.open": (MARK, 65),
    "subprocess.Popen": (["touch", MARK],),
    "subprocess.run": (["touch", MARK],),
    "subprocess.call": (["touch", MARK],),
    "subprocess.check_output": (["touch", MARK],),
    "subprocess.getoutput": (_SHELL,),
    "builtins.exec": (_CODE,),
    "builtins.eval": (_CODE,),
    "builtins.open": (MARK, "w"),
    "builtins.__import__": ("this",),
    "builtins.getattr": ("", "upper"),
    "builtins.compile": (_CODE, "x", "exec"),
    "io.open": (MARK, "w"),
    "_io.FileIO": (MARK, "w"),
    "codecs.open": (MARK, "w"),
    "pathlib.Path.touch": (MARK,),
    "shutil.copy": ("/etc/hostname", MARK),
    "shutil.rmtree": ("nothing",),
    "tempfile.mkdtemp": (),
    "runpy.run_path": ("gadget.py",),
    "runpy._run_code": (_CODE, {}),
    "importlib.import_module": ("antigravity",),
    "code.InteractiveInterpreter.runcode": (_CODE,),
    "pty.spawn": (["touch", MARK],),
    "pdb.run": (_CODE,),
    "bdb.Bdb.run": (_CODE,),
    "profile.run": (_CODE,),
    "cProfile.run": (_CODE,),
    "timeit.timeit": (_CODE,),
    "trace.Trace.run": (_CODE,),
    "doctest.debug_script": (_CODE,),
    "webbrowser.open": ("http://127.0.0.1:9/",),
    "urllib.request.urlopen": ("http://127.0.0.1:9/",),
    "socket.create_connection": (("127.0.0.1", 9),),
    "ctypes.CDLL": ("libc.so.6",),
    "marshal.loads": (b"N",),
    "pickle.loads": (b"N.",),
    "types.FunctionType": (),
    "functools.partial": (print,),
    "functools.reduce": (print, [1, 2]),
    "operator.methodcaller": ("system",),
    "logging.config.fileConfig": ("gadget.py",),
    "sys.setrecursionlimit": (50,),
    "signal.raise_signal": (15,),
    "os._exit": (3,),
    "numpy.load": ("gadget.npy",),
    "numpy.testing._private.utils.runstring": (_CODE, {}),
    "torch.load": ("gadget.pt",),
    "torch.hub.load": ("gadget", "x"),
    "torch.utils.collect_env.run": (_SHELL,),
    "torch._dynamo.guards.GuardBuilder.get": (_CODE,),
    "torch.jit.load": ("gadget.pt",),
    "torch.serialization.load": ("gadget.pt",),
    "torch.storage._load_from_bytes": (b"gadget",),
    "torch.nn.modules.module.Module": (),
    "loopwright.cli.main": (["env"],),
}


def opcodes(name: str, arguments: tuple[Any, ...], protocol: int = 4) -> bytes:
    """A pickle that names a function and asks for its call; the name need not exist here."""
    module, _, function = name.rpartition(".")
    body = pickle.dumps(tuple(a for a in arguments if not callable(a)), protocol=2)[2:-1]
    if protocol >= 4:
        text = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, function)]
        return b"\x80\x04" + text[0] + text[1] + pickle.STACK_GLOBAL + body + pickle.REDUCE + pickle.STOP
    return b"\x80\x02" + pickle.GLOBAL + f"{module}\n{function}\n".encode() + body + pickle.REDUCE + pickle.STOP


def plain(data: bytes) -> bytes:
    return data


def torch_zip(data: bytes) -> bytes:
    """The layout of torch.save, with the gadget as its pickle."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}}, buffer)
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else old.read(entry))
    return made.getvalue()


def torch_old(data: bytes) -> bytes:
    """The layout of torch.save before 1.6: four pickles one after another."""
    magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    return magic + version + pickle.dumps({"little_endian": True}, 2) + data + pickle.dumps([], 2)


def torch_tar(data: bytes) -> bytes:
    """The layout of torch 0.1."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zipped_twice(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", torch_zip(data))
        archive.writestr("data.pkl", data)
    return buffer.getvalue()


def as_json(data: bytes) -> bytes:
    """JSON with the pickle as text, as somebody might decode it again."""
    return b'{"@": "pickle", "v": "' + data.hex().encode() + b'"}'


def as_safetensors(data: bytes) -> bytes:
    """A safetensors header that is a pickle."""
    return len(data).to_bytes(8, "little") + data


WRAPPERS: list[Callable[[bytes], bytes]] = [
    plain, torch_zip, torch_old, torch_tar, zipped_twice, gzip.compress, bz2.compress, lzma.compress, as_json,
    as_safetensors,
]  # fmt: skip


def gadgets() -> list[tuple[str, bytes]]:
    """Name and bytes of every gadget: all calls, and all wrappers and protocols in turn."""
    found = []
    for number, (name, arguments) in enumerate(CALLS.items()):
        wrap = WRAPPERS[number % len(WRAPPERS)]
        found.append((f"{name} {wrap.__name__}", wrap(opcodes(name, arguments, (2, 4)[number % 2]))))
    data = opcodes("os.system", (_SHELL,))
    return found + [(f"os.system {wrap.__name__}", wrap(data)) for wrap in WRAPPERS]
