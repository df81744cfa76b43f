from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import lzma
import os
import random
import shutil
import stat
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loopwright.data import unpack
from loopwright.data.download import fetch
from loopwright.errors import DataError, LoopwrightWarning, SettingError


class Server(http.server.ThreadingHTTPServer):
    """Gives ``pages`` by path; counts how often each was asked for."""

    pages: dict[str, bytes]
    asked: list[str]


class Pages(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path.partition("?")[0])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            short = self.path.startswith("/short")
            self.send_header("Content-Length", str(len(page) + 5 * short))
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Pages)
    server.pages, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def sha(page: bytes) -> str:
    return hashlib.sha256(page).hexdigest()


def serve(server: Server, path: str, page: bytes) -> tuple[str, str]:
    server.pages[path] = page
    return f"http://127.0.0.1:{server.server_port}{path}", sha(page)


def zipped(**files: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    return held.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as archive:  # type: ignore[call-overload]
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, content if kind == tarfile.REGTYPE else b""


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- fetching


@pytest.mark.capability("FA-08")
def test_a_file_is_downloaded_and_unpacked_once_to_a_place_that_can_be_chosen(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, digest = serve(server, "/sets/digits.zip", zipped(train__one="1", train__two="2", readme="read me"))
    for _ in range(2):
        path = fetch(url, digest, folder=tmp_path / "here")
        assert everything(path) == {"readme": "read me", "train/one": "1", "train/two": "2"}
        assert path.name == "digits"
        assert path.is_relative_to(tmp_path / "here")
    unpacked = (path / "train/one").stat()
    fetch(url, digest, folder=tmp_path / "here")  # what is unpacked is not unpacked again
    assert (path / "train/one").stat() == unpacked
    assert server.asked == ["/sets/digits.zip"]
    monkeypatch.setenv("LOOPWRIGHT_DATA", str(tmp_path / "there"))
    assert fetch(url, digest).is_relative_to(tmp_path / "there")
    monkeypatch.delenv("LOOPWRIGHT_DATA")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert fetch(url, digest).is_relative_to(tmp_path / "home" / ".cache" / "loopwright")
    packed = fetch(url, digest, folder=tmp_path / "here", extract=False)
    assert packed.read_bytes() == server.pages["/sets/digits.zip"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_every_kind_of_tar_is_unpacked(server: Server, tmp_path: Path, mode: str) -> None:
    content = tarred(member("a/b", b"1"), member("a/empty", b"", tarfile.DIRTYPE), member("./c", b"2"), mode=mode)
    ending = mode.replace("w", ".tar").replace(":", ".")
    path = fetch(*serve(server, f"/set{ending}", content), folder=tmp_path)
    assert everything(path) == {"a/b": "1", "c": "2"}
    assert (path / "a/empty").is_dir()


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_single_packed_file_is_unpacked_to_a_file(
    server: Server, tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = fetch(*serve(server, f"/train.csv{ending}", pack(b"1,2")), folder=tmp_path)
    assert (path.name, path.read_text()) == ("train.csv", "1,2")


def test_file_urls_are_fetched_too(tmp_path: Path) -> None:
    source = tmp_path / "names.txt"
    source.write_text("a b")
    path = fetch(source.as_uri(), folder=tmp_path / "copy")
    assert (path.name, path.read_text()) == ("names.txt", "a b")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_this_machine_that_has_changed_is_fetched_anew(tmp_path: Path, packed: bool) -> None:
    source = tmp_path / ("set.csv.gz" if packed else "set.csv")
    for text in ("old", "new and longer", "new and shorte"):
        source.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        paths = [fetch(source.as_uri(), folder=tmp_path / "copy") for _ in range(2)]
        assert paths[0] == paths[1]
        assert paths[0].read_text() == text
    source.unlink()
    with pytest.raises(DataError, match=r"cannot fetch file:.*set\.csv.*No such file"):
        fetch(source.as_uri(), folder=tmp_path / "copy")


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        (Path("/data/a.zip"), "path.resolve().as_uri() for a file of this machine"),
        (b"https://example.org/a.zip", "'https://example.org/digits.zip'"),
        (None, "'https://example.org/digits.zip'"),
    ],
)
def test_what_is_no_text_is_no_url(url: Any, mend: str) -> None:
    with pytest.raises(SettingError) as error:
        fetch(url)
    assert str(error.value) == f"cannot fetch {url!r}, which is no text; expected a URL, such as {mend}"


def test_an_archive_that_cannot_be_unpacked_is_not_kept(tmp_path: Path) -> None:
    source = tmp_path / "set.zip"
    good = zipped(a="1")
    source.write_bytes(b"<html>please log in</html>".ljust(len(good)))
    stamp = source.stat()
    with pytest.raises(DataError, match=r"cannot unpack .*It is damaged, or no archive") as error:
        fetch(source.as_uri(), folder=tmp_path / "copy")
    assert everything(tmp_path / "copy") == {}
    assert error.value.__notes__ == [
        f"[loopwright] {next((tmp_path / 'copy').iterdir()) / 'set.zip'} was deleted: the next call fetches it anew"
    ]
    source.write_bytes(good)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert everything(fetch(source.as_uri(), folder=tmp_path / "copy")) == {"a": "1"}


def test_an_archive_that_is_as_asked_for_is_kept_though_it_cannot_be_unpacked(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/a.zip", b"no zip")
    for _ in range(2):
        with pytest.raises(DataError, match="It is damaged, or no archive"):
            fetch(url, digest, folder=tmp_path)
    assert len(server.asked) == 1


def test_a_full_disk_does_not_cost_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "set.zip"
    source.write_bytes(zipped(a="1"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(unpack._Budget, "copy", full)
        with pytest.raises(DataError, match=r"cannot unpack .*No space left on device$"):
            fetch(source.as_uri(), folder=tmp_path / "copy")
    place = next((tmp_path / "copy").iterdir())
    assert [path.name for path in place.iterdir()] == ["set.zip"]


def test_another_content_than_asked_for_names_both_hashes_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/a.txt", b"true")
    server.pages["/a.txt"] = b"false"
    with pytest.raises(DataError) as error:
        fetch(url, digest, folder=tmp_path)
    assert str(error.value) == (
        f"{url} has sha256 {sha(b'false')}, and {digest} was asked for. Either the file was changed or damaged, or the "
        "hash is that of another file"
    )
    assert everything(tmp_path) == {}


def test_a_file_that_was_damaged_on_the_disk_is_fetched_again(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/a.txt", b"true")
    path = fetch(url, digest, folder=tmp_path)
    path.write_text("flip")
    assert fetch(url, digest, folder=tmp_path).read_text() == "true"
    assert len(server.asked) == 2


def test_unpacked_files_that_were_changed_are_told_and_put_back(server: Server, tmp_path: Path) -> None:
    """With a hash, what is unpacked is verified as well as what is not; files that were added are not touched."""
    url, digest = serve(server, "/set.tar.gz", tarred(*(member(f"train/{n}", n.encode()) for n in ("1", "2", "3"))))
    path = fetch(url, digest, folder=tmp_path)
    (path / "train/1").write_text("X")  # of the same size, and made to look as old
    os.utime(path / "train/1", (0, 0))
    (path / "train/3").unlink()
    (path / "own").write_text("mine")
    with pytest.warns(LoopwrightWarning) as told:
        assert fetch(url, digest, folder=tmp_path) == path
    assert [str(one.message) for one in told] == [
        f"{path} was not as it had been unpacked: train/1 was changed, train/3 is missing. The files of the archive "
        "are there again; to change some, work on a copy of the folder"
    ]
    whole = {"own": "mine", "train/1": "1", "train/2": "2", "train/3": "3"}
    assert everything(path) == whole
    assert everything(fetch(url, digest, folder=tmp_path)) == whole
    assert len(server.asked) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [".set.sha256", "set", "set.tar.gz"]


@pytest.mark.parametrize("record", [None, "", "[]", "{"])
def test_what_was_unpacked_without_a_record_is_compared_with_its_archive(
    server: Server, tmp_path: Path, record: str | None
) -> None:
    url, digest = serve(server, "/a.zip", zipped(a="1", b="2"))
    path = fetch(url, digest, folder=tmp_path)
    kept = path.parent / ".a.sha256"
    kept.unlink()
    if record is not None:
        kept.write_text(record)
    assert everything(fetch(url, digest, folder=tmp_path)) == {"a": "1", "b": "2"}
    (path / "b").write_text("3")
    with pytest.warns(LoopwrightWarning, match="b was changed"):
        assert everything(fetch(url, digest, folder=tmp_path)) == {"a": "1", "b": "2"}


def test_a_single_file_that_was_unpacked_is_verified_too(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/train.csv.gz", gzip.compress(b"1,2"))
    path = fetch(url, digest, folder=tmp_path)
    path.write_text("1,3")
    with pytest.warns(LoopwrightWarning, match=r"train\.csv was not as it had been unpacked: was changed\. The files"):
        assert fetch(url, digest, folder=tmp_path).read_text() == "1,2"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_nothing_is_put_back_through_a_link(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/a.zip", zipped(in__a="1", b="2", c="3"))
    path = fetch(url, digest, folder=tmp_path / "data")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_text("mine")
    shutil.rmtree(path / "in")
    (path / "in").symlink_to(outside)
    (path / "b").unlink()
    (path / "b").symlink_to(outside / "a")
    (path / "c").unlink()
    os.mkfifo(path / "c")
    with pytest.warns(LoopwrightWarning, match="in/a was changed"):
        assert everything(fetch(url, digest, folder=tmp_path / "data")) == {"in/a": "1", "b": "2", "c": "3"}
    assert everything(outside) == {"a": "mine"}
    (path / "c").unlink()
    (path / "c").mkdir()
    shutil.rmtree(path / "in")
    (path / "in").write_text("a file in the place of a folder")
    with pytest.warns(LoopwrightWarning, match="c was changed, in/a is missing"):
        assert everything(fetch(url, digest, folder=tmp_path / "data")) == {"in/a": "1", "b": "2", "c": "3"}


@pytest.mark.parametrize("ending", ["", ".zip"])
def test_a_folder_that_cannot_be_made_says_what_to_name(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"a{ending}"
    source.write_bytes(zipped(a="1"))
    for folder, why in ((source, "Not a directory"), ("a\0b", "embedded null byte")):
        with pytest.raises(DataError) as error:
            fetch(source.as_uri(), folder=folder)
        text = str(error.value)
        assert text.startswith(f"cannot make the folder {folder}{os.sep}a-")
        assert text.endswith(
            f": {why}. Name one that can be written to: fetch(..., folder='data'), or the environment variable "
            "LOOPWRIGHT_DATA"
        )


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="of Linux")
def test_a_folder_where_nothing_can_be_is_an_error_of_ours(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("1")
    with pytest.raises(DataError, match=r"cannot make the folder /proc/nope/a-\w+: No such file or directory\. Name"):
        fetch(source.as_uri(), folder="/proc/nope")


def test_a_download_that_ends_early_is_no_file(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/short.txt", b"half")
    with pytest.raises(DataError, match=r"short\.txt ended after 4 of 9 bytes; try again"):
        fetch(url, digest, folder=tmp_path)
    assert everything(tmp_path) == {}


def test_what_is_not_there_says_so_with_another_way(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.server_port}/none.zip?token=secret"
    with pytest.raises(DataError) as error:
        fetch(url, "0" * 64, folder=tmp_path)
    text = str(error.value)
    assert text.startswith(f"cannot fetch http://127.0.0.1:{server.server_port}/none.zip: Not Found. Check the address")
    assert "secret" not in text


@pytest.mark.parametrize("url", ["http://127.0.0.1/a", "ftp://127.0.0.1/a", "data/a.zip", "C:\\a.zip"])
def test_only_what_nobody_can_change_on_the_way_is_fetched(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"write https://, or say what it must be|expected a URL that begins with"):
        fetch(url, folder=tmp_path)


def test_a_hash_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="sha256='abc' is not 64 hex digits"):
        fetch("https://127.0.0.1/a", "abc", folder=tmp_path)


def test_redirections_are_followed_but_not_to_files_of_this_machine(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/a.txt", b"true")
    there = f"http://127.0.0.1:{server.server_port}/to/"
    assert fetch(f"{there}{url}", digest, folder=tmp_path).read_text() == "true"
    secret = tmp_path / "secret"
    secret.write_text("s")
    with pytest.raises(DataError, match="cannot fetch"):
        fetch(f"{there}{secret.as_uri()}", sha(b"s"), folder=tmp_path)


def test_fetching_the_same_file_at_the_same_time_is_safe(server: Server, tmp_path: Path) -> None:
    url, digest = serve(server, "/many.tar.gz", tarred(*(member(f"f/{i}", b"%d" % i) for i in range(50))))
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: fetch(url, digest, folder=tmp_path), range(16)))
    assert len(paths) == 1
    assert len(everything(paths.pop())) == 50
    assert sorted(p.name for p in next(tmp_path.iterdir()).iterdir()) == [".many.sha256", "many", "many.tar.gz"]


def test_progress_of_a_big_file_is_shown_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(bytes(12_000_000))
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    fetch(source.as_uri(), folder=tmp_path / "copy")
    shown = capsys.readouterr()
    assert (
        shown.err == "\rfetching big.bin: 10 of 12 MB\rfetching big.bin: 12 of 12 MB\rfetching big.bin: 12 of 12 MB\n"
    )
    assert shown.out == ""


# ------------------------------------------------------------------------------------------------------ unpacking


def unpacked(tmp_path: Path, name: str, content: bytes) -> Path:
    packed = tmp_path / "outer" / name
    packed.parent.mkdir(exist_ok=True)
    packed.write_bytes(content)
    return unpack.unpack(packed, packed.parent / "inside")


def refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        unpacked(tmp_path, name, content)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert left == {"outer", f"outer/{name}"}, "something was written"
    (tmp_path / "outer" / name).unlink()


EVIL = ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "C:evil", "//host/evil", "a/b/../../../evil"]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("good", "1")
        archive.writestr(name, "2")
    refused(tmp_path, "a.zip", held.getvalue(), "leads out of the folder")
    refused(tmp_path, "a.tar.gz", tarred(member("good"), member(name)), "leads out of the folder")


@pytest.mark.parametrize("link", ["../evil", "/etc/passwd", "a/../../evil"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_no_link_leads_out(tmp_path: Path, link: str, kind: bytes) -> None:
    refused(tmp_path, "a.tar", tarred(member("l", kind=kind, link=link), mode="w"), "the link 'l' to .* leads out")


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    through = tarred(member("l", kind=tarfile.SYMTYPE, link="."), member("l/evil"), mode="w")
    refused(tmp_path, "a.tar", through, "holds the link 'l' to .*, which is no file of the archive")
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        info = zipfile.ZipInfo("l")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "../../evil")
    refused(tmp_path, "a.zip", held.getvalue(), "the link 'l' to .* leads out")


def test_links_inside_become_copies(tmp_path: Path) -> None:
    content = tarred(
        member("a/first", b"1"),
        member("b/soft", kind=tarfile.SYMTYPE, link="../a/first"),
        member("b/hard", kind=tarfile.LNKTYPE, link="a/first"),
    )
    path = unpacked(tmp_path, "a.tgz", content)
    assert everything(path) == {"a/first": "1", "b/hard": "1", "b/soft": "1"}
    assert not (path / "b/soft").is_symlink()


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_no_device_is_made(tmp_path: Path, kind: bytes) -> None:
    refused(tmp_path, "a.tar", tarred(member("d", kind=kind), mode="w"), "holds 'd', a special file")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.gz", "a.tar.xz"])
def test_a_bomb_does_not_go_off(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_FREE", 1_000_000)
    zeros = bytes(8_000_000)
    if name == "a.zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", zeros)
        content = held.getvalue()
    else:
        content = gzip.compress(zeros) if name == "a.gz" else tarred(member("z", zeros), mode=f"w:{name[6:]}")
    refused(tmp_path, name, content, "unpacks to more than 100 times its size and more than")


def test_a_header_made_to_fill_the_memory_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    refused(tmp_path, "a.tar", info.tobuf() + bytes(1024), "asks for 1,073,741,824 bytes")


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack._Budget.__init__, "__defaults__", (3,))
    refused(tmp_path, "a.zip", zipped(a="1", b="2", c="3", d="4"), "more than .* members")


def test_a_damaged_archive_is_an_error_of_ours_and_leaves_nothing(tmp_path: Path) -> None:
    whole = {
        "a.zip": zipped(a="1" * 500, b="2"),
        "a.tar.gz": tarred(member("a", b"1" * 500), member("b")),
        "a.tar": tarred(member("a", b"1" * 500), member("b"), mode="w"),
        "a.tar.xz": tarred(member("a", b"1" * 500), mode="w:xz"),
        "a.gz": gzip.compress(b"1" * 500),
    }
    draw = random.Random(0)
    seen = set()
    for _ in range(150):
        name, content = draw.choice(list(whole.items()))
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            unpacked(tmp_path, name, bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]))
        except DataError as error:
            seen.add(str(error).partition(" ")[0])
        shutil.rmtree(tmp_path / "outer")
    assert "cannot" in seen


def test_a_locked_zip_is_named(tmp_path: Path) -> None:
    content = bytearray(zipped(a="1"))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    refused(tmp_path, "a.zip", bytes(content), "cannot unpack .*encrypted")


@pytest.mark.skipif(sys.platform == "win32", reason="a matter of POSIX")
def test_unpacked_files_are_readable_as_other_files_are(server: Server, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    path = fetch(*serve(server, "/a.zip", zipped(a="1")), folder=tmp_path)
    assert (path / "a").stat().st_mode == plain.stat().st_mode
