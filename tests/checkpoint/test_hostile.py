"""Files made by somebody who means harm: nothing in them is executed or imported, and all errors are ours."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from gadgets import CALLS, MARK, gadgets, opcodes
from loopwright.checkpoint import decode, find, index, list_checkpoints, manifest, newest, read, verify, write
from loopwright.cli import main
from loopwright.errors import CheckpointError, LoopwrightError

FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "state.safetensors")


def make(folder: str = "run/checkpoints", name: str = "step-00000001") -> Path:
    """A checkpoint in a run folder, with all the files that there can be."""
    files = {"model": {"w": torch.arange(6.0).reshape(2, 3)}}
    state = {"t": torch.zeros(4), "optimizers": {"o": torch.ones(2)}, "n": 1}
    info = {"step": 1, "epoch": 0, "exact": True, "metrics": {"valid/loss": 0.5}, "monitor": "valid/loss",
            "mode": "min", "value": 0.5}  # fmt: skip
    write(Path(folder) / name, files, state, info)
    run = Path(folder).parent
    (run / "run.json").write_text('{"status": "done", "metrics": {}}')
    (run / "config.yaml").write_text("epochs: 1\n")
    (run / "checkpoints" / "index.json").write_text(json.dumps({"last": name, "best": name}))
    return Path(folder) / name


def forge(path: Path, **changes: Any) -> None:
    """Make sizes, checksums and the manifest right again, so that no checksum protects the reader."""
    file = path / "manifest.json"
    found = json.loads(file.read_text()) | changes
    for name, entry in found["files"].items() if isinstance(found["files"], dict) else []:
        if (path / name).is_file() and isinstance(entry, dict):
            data = (path / name).read_bytes()
            entry |= {"size": len(data), "blake2b": hashlib.blake2b(data, digest_size=32).hexdigest()}
    found.pop("checksum", None)
    text = json.dumps(found, sort_keys=True).encode()
    file.write_text(json.dumps({"checksum": hashlib.sha256(text).hexdigest(), **found}))


def command(*arguments: str) -> int:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return main(list(arguments))


# every way in which something of a checkpoint or of a run folder is read
LOADS: dict[str, Callable[[Path], Any]] = {
    "read": read,
    "verify": verify,
    "find": lambda path: find(path.parent),
    "list": lambda path: list_checkpoints(path.parent),
    "newest": lambda path: newest(path.parent),
    "index": lambda path: index(path.parent),
    "peek": manifest.peek,
    "ls": lambda path: command("checkpoints", "ls", str(path)),
    "ls of the run": lambda path: command("checkpoints", "ls", str(path.parent.parent), "--verify", "--json"),
    "show": lambda path: command("checkpoints", "show", str(path), "--all"),
    "show as JSON": lambda path: command("checkpoints", "show", str(path), "--json"),
    "verify by command": lambda path: command("checkpoints", "verify", str(path.parent.parent)),
    "prune": lambda path: command("checkpoints", "prune", str(path.parent.parent), "--keep", "1", "--dry-run"),
    "runs": lambda path: command("runs", str(path.parents[2] / "..")),
}

# what happens when code runs; looking up a module that a pickle names is the first of it
_EVENTS = {
    "pickle.find_class", "import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "ctypes.dlopen", "marshal.loads", "code.__new__", "webbrowser.open",
    "urllib.Request", "shutil.rmtree", "os.mkdir", "cpython.run_command", "os.kill",
}  # fmt: skip
_seen: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _EVENTS:
        _seen.append(f"{event} {str(arguments[:1])[:100]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python itself reports of code that is run or imported."""
    global _seen
    if not hasattr(watched, "on"):
        sys.addaudithook(_note)  # for the life of the process: it cannot be removed, and does nothing outside
        watched.on = True  # type: ignore[attr-defined]
    before = set(sys.modules)
    _seen = []
    try:
        yield _seen
    finally:
        found, _seen = _seen, None
        new = sorted(set(sys.modules) - before)
        found[:] = [*found, *(f"imported {name}" for name in new)]


@pytest.fixture(autouse=True)
def _warm() -> None:
    """What reading needs is imported, once, before anything is watched."""
    if hasattr(_warm, "done"):
        return
    _warm.done = True  # type: ignore[attr-defined]
    path = make("warm/run/checkpoints")
    for load in LOADS.values():
        load(path)
    with suppress(CheckpointError):
        read("warm/none")
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        codecs.lookup(name)  # json looks for these


def attempt(load: Callable[..., Any], path: Path, what: str) -> str | None:
    """The error of a load, which must be one of ours."""
    try:
        load(path)
    except LoopwrightError as error:
        return str(error)
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__module__}.{type(error).__name__}: {str(error)[:300]}")
    return None


def assert_nothing_ran(events: list[str], what: str) -> None:
    assert not events, f"{what}: {events[:5]}"
    assert not Path(MARK).exists(), what


# ------------------------------------------------------------------------------------------------ pickles


def test_there_are_enough_gadgets_and_they_do_run_where_pickles_are_read() -> None:
    assert len(gadgets()) >= 40
    ran = []
    for name in ("os.system", "subprocess.call", "builtins.exec", "builtins.eval", "os.mkdir", "cProfile.run"):
        for protocol in (2, 4):
            with watched() as events:
                pickle.loads(opcodes(name, CALLS[name], protocol))
            assert Path(MARK).exists(), name
            assert any(event.startswith("pickle.find_class") for event in events)
            Path(MARK).rmdir() if Path(MARK).is_dir() else Path(MARK).unlink()
            ran.append(name)
    assert len(ran) == 12


_LISTS = ("list", "index", "ls", "ls of the run", "prune")
READERS: dict[str, tuple[str, ...]] = {  # who reads a file
    "manifest.json": tuple(LOADS),
    "state.json": ("read", "verify", "show"),
    "model.safetensors": ("read", "verify", "show", "show as JSON"),
    "optimizer.safetensors": ("read", "show"),
    "state.safetensors": ("read", "show"),
    "../index.json": _LISTS,
    "../../run.json": ("runs", "ls of the run", "prune"),
    "../../config.yaml": ("show", "show as JSON"),
}


@pytest.mark.parametrize(("file", "forged"), [*((f, False) for f in READERS), *((f, True) for f in FILES[1:])])
def test_no_pickle_is_ever_opened(file: str, forged: bool) -> None:
    """Damaged: the checksum tells. Forged: checksums and sizes are right, and protect nothing."""
    path = make()
    good = (path / file).read_bytes(), (path / "manifest.json").read_bytes()
    for name, data in gadgets():
        (path / file).write_bytes(data)
        if forged:
            forge(path)
        with watched() as events:
            errors = {way: attempt(LOADS[way], path, f"{way} of {file}: {name}") for way in READERS[file]}
        assert_nothing_ran(events, f"{file}: {name}")
        if file in FILES:
            assert errors["read"] is not None, name
            assert file in errors["read"], name
    (path / file).write_bytes(good[0])
    (path / "manifest.json").write_bytes(good[1])
    assert read(path).info["step"] == 1


# ------------------------------------------------------------------------------------------------ names of code


def targets() -> list[str]:
    """Names of callables, and of modules that are not imported: those of the blocklists, and ways around them."""
    modules = (
        "antigravity", "this", "idlelib.idle", "turtledemo", "lib2to3.pgen2", "xmlrpc.server", "wsgiref.simple_server",
        "tkinter", "curses", "ensurepip", "venv", "smtpd", "telnetlib", "poplib", "nntplib", "imaplib", "cgi", "crypt",
        "sndhdr", "torch.onnx", "torch._inductor", "torch._export", "torch.utils.tensorboard", "torch.distributed.rpc",
        "torch.utils.cpp_extension", "numpy.distutils", "sklearn", "pandas", "matplotlib", "onnx", "_inductor",
        "_dynamo", "_export", "compiler", "func", "hub", "jit", "fx", "quantization", "ao", "xpu", "mtia",
    )  # fmt: skip
    forms = ("{}", "{}.main", "{}:main", "__import__('{}')")
    calls = [*CALLS, *(f"{name}.__globals__" for name in CALLS), *(f"builtins.{n}" for n in ("exec", "eval", "vars"))]
    return [*calls, *(form.format(module) for module in modules for form in forms)]


def spelled(target: str) -> list[Any]:
    """The ways in which configs of other frameworks name code."""
    return [
        {"_target_": target}, {"class_path": target, "init_args": {}}, {"_instantiator": target}, {"__class__": target},
        {"py/object": target}, {"py/reduce": [{"py/type": target}, {"py/tuple": ["x"]}]}, {"@": target, "v": ["x"]},
        {"@": "dtype", "v": target}, {"@": "dtype", "v": target.removeprefix("torch.")}, {"@": "device", "v": target},
        {"@": "defaultdict", "factory": target, "v": []}, {"@": "numpy", "dtype": target, "v": ""},
        {"@": "array", "dtype": target, "shape": [1], "name": "t"}, {"@": "tensor", "name": target},
        {"@": "path", "v": target}, {"@": ["tuple"], "v": target}, f"!!python/object/apply:{target} [x]",
        f"${{{target}:x}}", f"{{{{{target}}}}}",
    ]  # fmt: skip


def test_no_name_in_a_state_is_imported_or_called() -> None:
    names = targets()
    assert len(names) >= 200
    path = make()
    for target in names:
        refused = 0
        with watched() as events:
            for value in spelled(target):
                refused += attempt(lambda _, value=value: decode(value, {}), path, f"{value}") is not None
        assert_nothing_ran(events, target)
        assert refused >= 6, target
    for value in (value for target in names[::10] for value in spelled(target)[::4]):
        (path / "state.json").write_text(json.dumps({"a": value}))
        forge(path)
        with watched() as events:
            attempt(read, path, f"{value}")
        assert_nothing_ran(events, f"{value}")


@pytest.mark.parametrize("where", ["info", "notes", "run.json", "config.yaml", "index.json"])
def test_no_name_elsewhere_is_imported_or_called(where: str) -> None:
    path = make()
    good = {p: p.read_bytes() for p in path.parents[1].rglob("*") if p.is_file()}
    ways = {"info": ("read", "show", "show as JSON", "ls"), "notes": ("read", "show"), "run.json": ("runs", "prune"),
            "config.yaml": ("show", "show as JSON"), "index.json": _LISTS}[where]  # fmt: skip
    for target in targets()[::9]:
        values = spelled(target)
        if where == "info":
            forge(path, info={"step": 1, "x": values[1:3], "metrics": {target: target}, "settings": values[0]})
        elif where == "notes":
            files = json.loads((path / "manifest.json").read_text())["files"]
            name = target.removeprefix("torch.")
            files["model.safetensors"] |= {"tensors": {"w": {"dtype": name, "shape": [2, 3]}}, "aliases": {"x": target}}
            forge(path, files=files)
        elif where == "run.json":
            (path.parents[1] / where).write_text(json.dumps({"status": values[0], "metrics": {"m": target, target: 1}}))
        elif where == "index.json":
            (path.parent / where).write_text(json.dumps({"last": target, "best": values[0]}))
        else:
            lines = [f"a: !!python/object/apply:{target} [x]", f"b: !!python/name:{target}", json.dumps(values[:6])]
            (path.parents[1] / where).write_text("\n".join(lines))
        with watched() as events:
            for way in ways:
                attempt(LOADS[way], path, f"{way} {where} {target}")
        assert_nothing_ran(events, f"{where} {target}")
        for kept, content in good.items():
            kept.write_bytes(content)


# ------------------------------------------------------------------------------------------------ bombs


def header(entries: dict[str, Any] | str | bytes, *, length: int | None = None, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else (json.dumps(entries) if isinstance(entries, dict) else entries)
    raw = text if isinstance(text, bytes) else text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP, HUGE = 100_000, 10**4000
TENSORS: dict[str, bytes] = {
    "header of 2^63 bytes": header("{}", length=2**63), "header of 2^64 - 1 bytes": header("{}", length=2**64 - 1),
    "header longer than the file": header("{}", length=10**6), "header of 0 bytes": header("", length=0),
    "no header": b"", "half a length": b"\0\0\0", "header that is a list": header("[]"), "null": header("null"),
    "a number": header("12345"), "deep header": header("[" * DEEP), "deep objects": header('{"a":' * DEEP),
    "huge shape": header({"w": tensor([2**40, 2**40], [0, 4])}), "2^62": header({"w": tensor([2**62], [0, 2**64])}),
    "many dimensions": header({"w": tensor([1] * 10**5, [0, 4])}, body=bytes(4)),
    "a huge number": header('{"w": {"dtype": "F32", "data_offsets": [0, 4], "shape": [' + "9" * 4000 + "]}}"),
    "10^5 digits": header('{"w": {"dtype": "F32", "data_offsets": [0, 4], "shape": [' + "9" * 10**5 + "]}}"),
    "negative shape": header({"w": tensor([-1, -1], [0, 4])}, body=bytes(4)),
    "shape of floats": header({"w": tensor([1.0], [0, 4])}, body=bytes(4)),
    "shape of 1e308": header({"w": tensor([1e308], [0, 4])}, body=bytes(4)),
    "shape of text": header({"w": tensor("11", [0, 4])}, body=bytes(4)),
    "shape of truths": header({"w": tensor([True], [0, 4])}, body=bytes(4)),
    "no shape": header({"w": {"dtype": "F32"}}), "entry that is a list": header({"w": []}),
    "unknown type": header({"w": tensor([1], [0, 4], "F33")}, body=bytes(4)),
    "type that is a list": header({"w": tensor([1], [0, 4], ["F32"])}, body=bytes(4)),
    "overlapping": header({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, body=bytes(12)),
    "the same bytes 1000 times": header({str(i): tensor([1 << 20], [0, 4 << 20]) for i in range(1000)}, body=bytes(64)),
    "a hole": header({"a": tensor([1], [0, 4]), "b": tensor([1], [8, 12])}, body=bytes(12)),
    "backwards": header({"w": tensor([1], [4, 0])}, body=bytes(4)),
    "beyond the end": header({"w": tensor([1000], [0, 4000])}, body=bytes(4)),
    "far beyond": header({"w": tensor([1], [2**62, 2**62 + 4])}, body=bytes(4)),
    "negative offsets": header({"w": tensor([1], [-4, 0])}, body=bytes(4)),
    "offsets of floats": header({"w": tensor([1], [0.0, 4.0])}, body=bytes(4)),
    "three offsets": header({"w": tensor([1], [0, 4, 8])}, body=bytes(8)),
    "bytes left over": header({"w": tensor([1], [0, 4])}, body=bytes(1000)),
    "not UTF-8": header(b'{"\xff": 1}'), "NUL": header(b'{"w\0": 1}\0'),
    "UTF-16": header(json.dumps({"w": tensor([1], [0, 4])}).encode("utf-16")),
}  # fmt: skip


def nested(kind: str, depth: int) -> str:
    return ('{"@":"' + kind + '","v":[') * depth + "]}" * depth


STATES: dict[str, str] = {
    "deep lists": "[" * DEEP + "]" * DEEP, "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "unclosed": "[" * DEEP, "900 lists": "[" * 900 + "]" * 900, "70 lists": "[" * 70 + "]" * 70,
    **{f"deep {kind}": nested(kind, 300) for kind in ("tuple", "dict", "set", "deque", "OrderedDict", "Counter")},
    "an int of 10^5 digits": "9" * 10**5, "a float of 10^5 digits": "0." + "9" * 10**5, "1e999999999": "[1e999999999]",
    "hexadecimal": '{"@":"int","v":"' + "f" * 10**6 + '"}', "int that is none": '{"@":"int","v":"zz"}',
    "range": '{"@":"range","v":[0,1e308,1]}', "long range": '{"@":"range","v":[0,' + "9" * 1000 + ",1]}",
    "step 0": '{"@":"range","v":[0,1,0]}', "deque": '{"@":"deque","v":[],"maxlen":-1}',
    "sparse": '{"@":"sparse_coo","indices":[],"values":[],"size":[1e30]}',
    "huge sparse": '{"@":"sparse_coo","indices":{"@":"tensor","name":"t"},"values":{"@":"tensor","name":"t"},'
                   '"size":[4611686018427387904,4611686018427387904]}',
    "array": '{"@":"array","dtype":"<f8","shape":[1000000000000],"name":"t"}',
    "array of objects": '{"@":"array","dtype":"|O","shape":[1],"name":"t"}',
    "negative array": '{"@":"array","dtype":"|u1","shape":[-1],"name":"t"}',
    "scalar of objects": '{"@":"numpy","dtype":"|O","v":"AAAAAAAAAAA="}',
    "text of 2 GB": '{"@":"numpy","dtype":"<U536870911","v":""}', "void": '{"@":"numpy","dtype":"|V1000000000","v":""}',
    "records": '{"@":"numpy","dtype":"i4,i4","v":""}', "Size": '{"@":"Size","v":[' + "9" * 30 + "]}",
    "device": '{"@":"device","v":"cuda:999999999999999999999"}', "device that is none": '{"@":"device","v":"gpu"}',
    "unhashable key": '{"@":"dict","v":[[[1],1]]}', "pair of three": '{"@":"dict","v":[[1,2,3]]}',
    "no value": '{"@":"tuple"}', "value of another type": '{"@":"tuple","v":5}', "tag that is a list": '{"@":[]}',
    "NaN": "NaN", "Infinity": "[Infinity, -Infinity]", "twice": '{"a":1,"a":2}', "surrogate": '"\\ud800"',
    "NUL in a path": '{"@":"path","v":"a\\u0000b"}', "empty": "", "not UTF-8": "\udcff", "a BOM": "\ufeff{}",
    "infinite set": '{"@":"set","v":[{"@":"float","v":"nan"},{"@":"float","v":"nan"}]}',
    "complex of three": '{"@":"complex","v":[1,2,3]}', "bytes that are none": '{"@":"bytes","v":"*"}',
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_bomb_in_a_file_of_tensors_is_refused(name: str) -> None:
    path = make()
    (path / "model.safetensors").write_bytes(TENSORS[name])
    forge(path)
    error = attempt(read, path, name)
    assert error is not None
    assert "model.safetensors cannot be read as tensors" in error
    for way in ("verify", "show", "show as JSON", "ls of the run"):
        attempt(LOADS[way], path, f"{way}: {name}")


@pytest.mark.parametrize("name", STATES)
def test_a_bomb_in_the_state_is_an_error_of_ours_or_plain_data(name: str) -> None:
    path = make()
    (path / "state.json").write_bytes(STATES[name].encode("utf-8", "surrogateescape"))
    forge(path)
    attempt(read, path, name)
    (path / "state.json").unlink()
    with suppress(ValueError, RecursionError):  # the same in the manifest, which listings read
        forge(path, info={"step": json.loads(STATES[name]), "metrics": json.loads(STATES[name]), "exact": True})
        for way in ("read", "list", "index", "ls", "ls of the run", "show", "show as JSON", "prune"):
            attempt(LOADS[way], path, f"{way}: {name}")


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_no_bomb_takes_memory() -> None:
    """All of them in a process that may have 1 GB more than it has, of which they take less than 200 MB."""
    code = (
        "import resource, sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "import test_hostile as t\n"
        "path = t.make()\n"
        "t.read(path), t.LOADS['show'](path)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "before, errors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []\n"
        "for name, bombs in (('model.safetensors', t.TENSORS), ('state.json', t.STATES)):\n"
        "    for title, bomb in bombs.items():\n"
        "        path = t.make()\n"
        "        data = bomb if isinstance(bomb, bytes) else bomb.encode('utf-8', 'surrogateescape')\n"
        "        (path / name).write_bytes(data)\n"
        "        t.forge(path)\n"
        "        errors += [t.attempt(t.LOADS[way], path, title) for way in ('read', 'verify', 'show')]\n"
        "assert not [e for e in errors if e and ('MemoryError' in e or 'allocate' in e)], errors\n"
        "print(len(errors), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loads, kilobytes = map(int, done.stdout.split())
    assert loads == 3 * (len(TENSORS) + len(STATES)) > 200
    assert kilobytes < 200_000


VALUES: list[Any] = [
    HUGE, -HUGE, 10**400, 1e308, -1, True, None, "x" * 10**5, "\x1b[2J\x1b]0;owned\x07", [], {}, [[]], {"@": "tuple"},
    {"@": "float", "v": "inf"}, {"@": "float", "v": "nan"}, {"@": "int", "v": "0x" + "f" * 5000}, ["a", 1, None],
]  # fmt: skip


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[pytest.mark.nightly] if i % 2 else []) for i in range(len(VALUES))]
)
def test_no_value_in_a_manifest_breaks_a_reader(number: int) -> None:
    path, value = make(), VALUES[number]
    keys = ("step", "epoch", "batch", "samples", "seconds", "stage", "written", "exact", "versions", "metrics",
            "monitor", "mode", "value", "settings", "other")  # fmt: skip
    info = json.loads((path / "manifest.json").read_text())["info"]
    for key in keys:
        forge(path, info={**info, key: value})
        for way in LOADS:
            attempt(LOADS[way], path, f"{way}: {key}")
    forge(path, info=info, order=value)
    for way in LOADS:
        attempt(LOADS[way], path, f"{way}: order")
    for key in ("size", "blake2b", "group", "tensors", "aliases"):
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["model.safetensors"][key] = value
        found = {**json.loads((path / "manifest.json").read_text()), "files": files}
        found.pop("checksum")
        (path / "manifest.json").write_bytes(manifest.render(found))
        for way in LOADS:
            attempt(LOADS[way], path, f"{way}: {key}")
        make()


@pytest.mark.parametrize(
    "name", ["../../run.json", "..", "/etc/passwd", "a/b.json", "a\\b.json", "C:x.json", "x\0.json", ".hidden.json",
             "x.json.exe", "", " .json", "state.json/", "\n.json"]
)  # fmt: skip
def test_no_file_outside_is_named(name: str) -> None:
    path = make()
    files = json.loads((path / "manifest.json").read_text())["files"]
    forge(path, files=files | {name: {"size": 2, "blake2b": "0" * 64, "group": "x"}})
    for way in LOADS:
        attempt(LOADS[way], path, way)
    assert "names a file that no checkpoint has" in (attempt(read, path, name) or "")


def _links() -> Iterator[Any]:
    for file in (*FILES, "../index.json", "../../run.json", "../../config.yaml"):
        for target in ("/dev/zero", "/dev/stdin", "pipe", "folder", "itself", "nothing"):
            yield pytest.param(file, target)


@pytest.mark.parametrize("file", FILES)
def test_a_link_in_the_place_of_a_file_is_refused_by_name(file: str) -> None:
    """Also to the very bytes that were there. The folders above may be links: runs are moved to larger disks."""
    path = make()
    Path("elsewhere").mkdir()
    os.rename(path / file, Path("elsewhere") / file)
    (path / file).symlink_to(Path("elsewhere", file).absolute())
    for way in (read, verify):
        with pytest.raises(CheckpointError) as caught:
            way(path)
        assert str(caught.value) == (
            f"{path / file} is a link, and the files of a checkpoint lie in its folder. If you have put it there, put "
            f"a copy in its place: cp --remove-destination {Path('elsewhere', file).resolve()} {path / file}"
        )
    (path / file).unlink()
    os.rename(Path("elsewhere") / file, path / file)
    for folder in (path, path.parent, path.parent.parent):
        os.rename(folder, "elsewhere/it")
        folder.symlink_to(Path("elsewhere/it").absolute())
        assert read(path).state["n"] == 1
        folder.unlink()
        os.rename("elsewhere/it", folder)


@pytest.mark.parametrize(("file", "target"), list(_links()))
def test_links_pipes_and_devices_end_no_reader(file: str, target: str) -> None:
    """A reader that opened one of them would never come back."""
    path = make()
    victim = path / file
    victim.unlink()
    if target == "pipe":
        os.mkfifo(victim)
    elif target == "folder":
        victim.mkdir()
    else:
        victim.symlink_to({"itself": victim.name, "nothing": "gone"}.get(target, target))
    for size in (None, 0):
        if size == 0 and file in FILES[1:]:
            found = json.loads((path / "manifest.json").read_text())
            found["files"][file] |= {"size": 0, "blake2b": hashlib.blake2b(b"", digest_size=32).hexdigest()}
            found.pop("checksum")
            (path / "manifest.json").write_bytes(manifest.render(found))
        for way in LOADS:
            attempt(LOADS[way], path, f"{way}: {file} is {target}")
