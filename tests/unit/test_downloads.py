"""Downloads from a server on this machine that does what servers and networks do."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wmh_lora import downloads
from wmh_lora.downloads import PublishedFile, download
from wmh_lora.errors import ChecksumError, WeightsError

SOURCE = Path(__file__).resolve().parents[3] / "src"
CONTENT = random.Random(1).randbytes(300_000)
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the server does at one path."""

    content: bytes = CONTENT
    ranges: bool = True
    cut_after: int | None = None  # bytes of body until the connection ends
    status: list[int] = field(default_factory=list)  # of the first answers, then it works
    location: str | None = None  # where it redirects to
    shift: int = 0  # added to the first byte of a range
    announced: int | None = None  # size, where it is not that of the content
    pause_s: float = 0.0  # after every 10 kB


class Server(ThreadingHTTPServer):
    """Serves `Behaviour`s by path, and keeps (path, Range header) of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        behaviour = self.server.behaviours.get(self.path)
        if behaviour is None:
            self.send_error(404)
        elif behaviour.status:
            self.send_error(behaviour.status.pop(0))
        elif behaviour.location is not None:
            self.send_response(302)
            self.send_header("Location", behaviour.location)
            self.end_headers()
        else:
            self._answer(behaviour, wanted if behaviour.ranges else None)

    def _answer(self, behaviour: Behaviour, wanted: str | None) -> None:
        body, size = behaviour.content, behaviour.announced or len(behaviour.content)
        if wanted is None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + behaviour.shift
            body = body[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        try:
            body = body[: behaviour.cut_after]
            for start in range(0, len(body), 10_000):
                self.wfile.write(body[start : start + 10_000])
                time.sleep(behaviour.pause_s)
        except ConnectionError:
            pass  # the other side went away
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_detours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_PAUSE_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def _part(target: Path) -> Path:
    return target.with_name("weights.pth.part")


def _get(target: Path, *urls: str, **options: Any) -> None:
    target.parent.mkdir(exist_ok=True)
    download(PublishedFile(urls, len(CONTENT), SHA256), target, **options)


def _assert_done(target: Path) -> None:
    assert target.read_bytes() == CONTENT
    assert sorted(p.name for p in target.parent.iterdir()) == [".weights.pth.lock", "weights.pth"]


# --- it arrives -------------------------------------------------------------------------------


def test_download(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour()
    steps: list[tuple[int, int, str]] = []
    _get(target, server.url("/a"), progress=lambda *step: steps.append(step))
    _assert_done(target)
    assert server.requests == [("/a", None)]
    assert [done for done, _, _ in steps] == sorted({done for done, _, _ in steps})
    assert steps[-1] == (len(CONTENT), len(CONTENT), "weights.pth")


def test_existing_file_is_kept_if_right_and_replaced_if_not(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour()
    target.parent.mkdir()
    target.write_bytes(CONTENT[::-1])
    _get(target, server.url("/a"))
    _assert_done(target)
    _get(target, server.url("/a"))
    assert len(server.requests) == 1


def test_broken_connections_are_resumed(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(cut_after=70_000)
    _get(target, server.url("/a"))
    _assert_done(target)
    ranges = [wanted for _, wanted in server.requests]
    assert ranges == [None, *(f"bytes={70_000 * n}-" for n in (1, 2, 3, 4))]


def test_server_without_ranges_starts_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    _part(target).write_bytes(b"x" * 123)
    server.behaviours["/a"] = Behaviour(ranges=False)
    _get(target, server.url("/a"))
    _assert_done(target)
    assert server.requests == [("/a", "bytes=123-")]


def test_server_without_ranges_that_always_breaks_off(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(ranges=False, cut_after=1000)
    with pytest.raises(WeightsError, match=r"broke off after 1000 of 300000 bytes"):
        _get(target, server.url("/a"))
    assert not target.exists()
    assert len(server.requests) == 4  # one that brought something, three that did not


def test_restart_drops_what_was_there(server: Server, target: Path) -> None:
    """Else the old rest would pass for received bytes when the new transfer breaks off."""
    target.parent.mkdir()
    _part(target).write_bytes(b"x" * 5000)
    server.behaviours["/a"] = Behaviour(ranges=False, cut_after=1000)
    with pytest.raises(WeightsError, match="broke off"):
        _get(target, server.url("/a"))
    assert _part(target).read_bytes() == CONTENT[:1000]


def test_killed_process_is_continued(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(pause_s=0.05)
    target.parent.mkdir()
    code = (
        "import sys; from pathlib import Path; from wmh_lora import downloads as d; "
        "d._CHUNK_BYTES = 10_000; size = int(sys.argv[3]); "
        "d.download(d.PublishedFile((sys.argv[1],), size, sys.argv[4]), Path(sys.argv[2]))"
    )
    arguments = [server.url("/a"), str(target), str(len(CONTENT)), SHA256]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    try:
        deadline = time.monotonic() + 30
        while not (_part(target).exists() and _part(target).stat().st_size > 30_000):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    have = _part(target).stat().st_size
    assert 0 < have < len(CONTENT)
    server.behaviours["/a"].pause_s = 0.0
    _get(target, server.url("/a"))
    _assert_done(target)
    assert server.requests == [("/a", None), ("/a", f"bytes={have}-")]


def test_two_processes_fetch_once(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(pause_s=0.01)
    target.parent.mkdir()
    code = (
        "import sys; from pathlib import Path; from wmh_lora import downloads as d; "
        "size = int(sys.argv[3]); "
        "d.download(d.PublishedFile((sys.argv[1],), size, sys.argv[4]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, server.url("/a"), str(target), str(len(CONTENT)), SHA256]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    _assert_done(target)
    assert len(server.requests) == 1


def test_redirect(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(location=server.url("/b"))
    server.behaviours["/b"] = Behaviour()
    target.parent.mkdir()
    _part(target).write_bytes(CONTENT[:5000])
    _get(target, server.url("/a"))
    _assert_done(target)
    assert server.requests[-1] == ("/b", "bytes=5000-")


def test_busy_server_is_asked_again(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(status=[503, 429])
    _get(target, server.url("/a"))
    _assert_done(target)


# --- another mirror ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        Behaviour(status=[404]),
        Behaviour(content=CONTENT[::-1]),
        Behaviour(content=CONTENT + b"!"),
        Behaviour(content=b"<html>Please log in</html>"),
        Behaviour(status=[503] * 3),
    ],
    ids=["absent", "same size", "larger", "captive portal", "busy"],
)
def test_next_mirror(server: Server, target: Path, first: Behaviour) -> None:
    first = Behaviour(**{**vars(first), "status": list(first.status)})
    server.behaviours |= {"/a": first, "/b": Behaviour()}
    _get(target, server.url("/a"), server.url("/b"))
    _assert_done(target)


def test_part_of_one_mirror_is_completed_by_another(server: Server, target: Path) -> None:
    server.behaviours |= {"/a": Behaviour(ranges=False, cut_after=4000), "/b": Behaviour()}
    _get(target, server.url("/a"), server.url("/b"))
    _assert_done(target)
    assert server.requests[-1] == ("/b", "bytes=4000-")


# --- it cannot be had -------------------------------------------------------------------------


def test_wrong_bytes_are_not_kept(server: Server, target: Path) -> None:
    server.behaviours["/a"] = Behaviour(content=CONTENT[::-1])
    with pytest.raises(ChecksumError, match="served another file") as error:
        _get(target, server.url("/a"))
    assert SHA256 in str(error.value)
    assert hashlib.sha256(CONTENT[::-1]).hexdigest() in str(error.value)
    assert [path.name for path in target.parent.iterdir()] == [".weights.pth.lock"]


def test_wrong_bytes_after_a_part_are_asked_for_once_more(server: Server, target: Path) -> None:
    target.parent.mkdir()
    _part(target).write_bytes(b"x" * 100)
    server.behaviours["/a"] = Behaviour(content=CONTENT[::-1])
    with pytest.raises(ChecksumError, match="served another file"):
        _get(target, server.url("/a"))
    assert [wanted for _, wanted in server.requests] == ["bytes=100-", None]
    assert not _part(target).exists()


@pytest.mark.parametrize("length", [100, len(CONTENT), len(CONTENT) + 7])
def test_damaged_part_is_fetched_anew(server: Server, target: Path, length: int) -> None:
    target.parent.mkdir()
    _part(target).write_bytes(b"x" * length)
    server.behaviours["/a"] = Behaviour()
    _get(target, server.url("/a"))
    _assert_done(target)
    assert server.requests[-1] == ("/a", None)


def test_changed_file_is_not_glued_to_the_part(server: Server, target: Path) -> None:
    target.parent.mkdir()
    _part(target).write_bytes(CONTENT[:1000])
    server.behaviours["/a"] = Behaviour(content=CONTENT + CONTENT)
    with pytest.raises(WeightsError, match="the file has 600000 bytes there, expected 300000"):
        _get(target, server.url("/a"))
    assert _part(target).read_bytes() == CONTENT[:1000]


def test_another_range_than_asked_for(server: Server, target: Path) -> None:
    target.parent.mkdir()
    _part(target).write_bytes(CONTENT[:1000])
    server.behaviours["/a"] = Behaviour(shift=1)
    with pytest.raises(WeightsError, match="another part of the file"):
        _get(target, server.url("/a"))


def test_every_mirror_is_named(server: Server, target: Path) -> None:
    server.behaviours["/b"] = Behaviour(status=[403])
    with pytest.raises(WeightsError) as error:
        _get(target, server.url("/a"), server.url("/b"))
    assert f"{server.url('/a')}: the server answered 404 Not Found." in str(error.value)
    assert f"{server.url('/b')}: the server answered 403 Forbidden." in str(error.value)


def test_no_network(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WeightsError, match=r"no connection \(.*refused"):
        _get(target, f"http://127.0.0.1:{port}/a")


def test_silent_server_times_out(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_TIMEOUT_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(WeightsError, match=r"no connection .*timed out"),
    ):
        _get(target, f"http://127.0.0.1:{silent.getsockname()[1]}/a")


def test_full_disk(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behaviours["/a"] = Behaviour()
    usage = type(shutil.disk_usage(os.curdir))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MB are needed") as error:
        _get(target, server.url("/a"))
    assert error.value.errno == errno.ENOSPC
    assert not server.requests


# --- proxies ----------------------------------------------------------------------------------


def test_proxy_of_the_environment(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy is asked for the whole address, so the server itself can stand in for one."""
    server.behaviours["http://weights.invalid/a"] = Behaviour()
    monkeypatch.setenv("http_proxy", server.url(""))
    _get(target, "http://weights.invalid/a")
    _assert_done(target)
    assert server.requests == [("http://weights.invalid/a", None)]


def test_exceptions_from_the_proxy(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behaviours["/a"] = Behaviour()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    _get(target, server.url("/a"))
    _assert_done(target)
