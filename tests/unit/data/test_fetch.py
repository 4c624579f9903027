"""Fetching from a server on this machine that speaks a little of Dataverse and of Kaggle."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wmh_lora import downloads
from wmh_lora.data.fetch import (
    CHALLENGE_DOI,
    fetch_dataverse,
    fetch_kaggle,
    kaggle_credentials,
    list_dataverse,
)
from wmh_lora.errors import ConfigError, DataError

PHILIPS = "test/Amsterdam/Philips_VU .PETMR_01./161"
FILES = {
    "readme.pdf": b"about",
    "training/Utrecht/0/pre/FLAIR.nii.gz": b"flair " * 3000,
    "training/Utrecht/0/pre/T1.nii.gz": b"t1",
    "training/Utrecht/0/pre/3DT1.nii.gz": b"large",
    "training/Utrecht/0/orig/FLAIR.nii.gz": b"raw",
    "training/Utrecht/0/wmh.nii.gz": b"mask",
    f"{PHILIPS}/wmh.nii.gz": b"other mask",
    "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz": b"o3",
}
NEEDED = {
    name: content
    for name, content in FILES.items()
    if not any(part in name for part in ("3DT1", "orig", "additional"))
}
USER, KEY = "somebody", "secret"


class Server(ThreadingHTTPServer):
    """Serves `FILES` by number; what goes wrong is set by the tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = dict(FILES)
        self.algorithm = "SHA-1"
        self.restricted: set[str] = set()
        self.folder_prefix = ""
        self.cut: dict[str, int] = {}  # bytes of the first answer for a file
        self.archive = b""
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, range, authorization

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self) -> dict[str, Any]:
        rows = []
        for number, (path, content) in enumerate(FILES.items()):
            folder, _, name = path.rpartition("/")
            digest = hashlib.new(self.algorithm.replace("SHA-", "SHA").lower(), content).hexdigest()
            row: dict[str, Any] = {
                "label": name,
                "restricted": path in self.restricted,
                "dataFile": {
                    "id": number,
                    "filename": name,
                    "filesize": len(content),
                    "checksum": {"type": self.algorithm, "value": digest},
                },
            }
            if folder or self.folder_prefix:
                row["directoryLabel"] = self.folder_prefix + folder
            rows.append(row)
        version = {"files": rows, "license": {"name": "CC BY-NC 4.0"}}
        return {"status": "OK", "data": {"latestVersion": version}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted, login = self.headers["Range"], self.headers["Authorization"]
        self.server.requests.append((self.path, wanted, login))
        if self.path.startswith(
            "/api/datasets/:persistentId/?persistentId=doi%3A10.34894%2FAECRSD"
        ):
            self._send(json.dumps(self.server.listing()).encode())
        elif self.path.startswith("/api/access/datafile/"):
            name = list(FILES)[int(self.path.rpartition("/")[2])]
            self._send(self.server.content[name], wanted, self.server.cut.pop(name, None))
        elif self.path == "/api/v1/datasets/download/owner/wmh":
            expected = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
            if login != expected:
                self.send_error(401)
                return
            self.send_response(302)
            self.send_header("Location", "/store/archive.zip?signature=private")
            self.end_headers()
        elif self.path.startswith("/store/") and self.server.archive:
            self._send(self.server.archive, wanted, self.server.cut.pop("archive", None))
        else:
            self.send_error(404)

    def _send(self, content: bytes, wanted: str | None = None, cut: int | None = None) -> None:
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:] if cut is None else content[start : start + cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "_PAUSE_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def below(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "source.json"
    }


def portable(files: dict[str, bytes]) -> dict[str, bytes]:
    """Windows cannot store a name that ends in a dot."""
    return {name.replace("PETMR_01.", "PETMR_01"): content for name, content in files.items()}


def downloaded(server: Server) -> list[tuple[str, str | None]]:
    return [(path, wanted) for path, wanted, _ in server.requests if "datafile" in path]


@pytest.mark.parametrize("algorithm", ["MD5", "SHA-1", "SHA-256", "SHA-512"])
def test_files_are_fetched_and_compared(tmp_path: Path, server: Server, algorithm: str) -> None:
    server.algorithm = algorithm
    seen: list[tuple[int, int, str]] = []
    paths = fetch_dataverse(
        tmp_path / "new" / "data", server=server.url, progress=lambda *step: seen.append(step)
    )
    assert below(tmp_path / "new" / "data") == portable(NEEDED)
    assert {str(path) for path in paths} == set(portable(NEEDED))
    total = sum(map(len, NEEDED.values()))
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1][:2] == (total, total)
    record = json.loads((tmp_path / "new" / "data" / "source.json").read_text())
    assert (record["identifier"], record["licence"]) == (CHALLENGE_DOI, "CC BY-NC 4.0")
    assert set(record["files"]) == set(portable(NEEDED))


def test_everything_is_fetched_if_asked_for(tmp_path: Path, server: Server) -> None:
    fetch_dataverse(tmp_path, everything=True, server=server.url)
    assert below(tmp_path) == portable(FILES)


def test_a_cut_transfer_goes_on_where_it_ended(tmp_path: Path, server: Server) -> None:
    flair = "training/Utrecht/0/pre/FLAIR.nii.gz"
    server.cut[flair] = 7000
    fetch_dataverse(tmp_path, server=server.url)
    assert below(tmp_path) == portable(NEEDED)
    number = list(FILES).index(flair)
    wanted = [wanted for path, wanted in downloaded(server) if path.endswith(f"/{number}")]
    assert wanted == [None, "bytes=7000-"]


def test_what_is_there_is_not_fetched_again(tmp_path: Path, server: Server) -> None:
    fetch_dataverse(tmp_path, server=server.url)
    server.requests.clear()
    (tmp_path / "readme.pdf").unlink()
    fetch_dataverse(tmp_path, server=server.url)
    assert downloaded(server) == [("/api/access/datafile/0", None)]


def test_another_file_than_the_published_is_not_kept(tmp_path: Path, server: Server) -> None:
    mask = "training/Utrecht/0/wmh.nii.gz"
    server.content[mask] = b"MASK"  # of the same size
    with pytest.raises(DataError, match=r"served another file: expected sha1:"):
        fetch_dataverse(tmp_path, server=server.url)
    assert mask not in below(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "source.json").exists()


def test_another_size_than_the_published_is_refused(tmp_path: Path, server: Server) -> None:
    server.content["readme.pdf"] = b"a login page"
    with pytest.raises(DataError, match="has 12 bytes there, expected 5"):
        fetch_dataverse(tmp_path, server=server.url)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path, server: Server) -> None:
    (tmp_path / "readme.pdf").write_bytes(b"notes")
    with pytest.raises(DataError, match="is not the published file; remove it"):
        fetch_dataverse(tmp_path, server=server.url)
    assert (tmp_path / "readme.pdf").read_bytes() == b"notes"


def test_restricted_files_are_told(tmp_path: Path, server: Server) -> None:
    server.restricted.add("readme.pdf")
    with pytest.raises(DataError, match=r"restricts access to 1 files.*readme\.pdf"):
        fetch_dataverse(tmp_path, server=server.url)
    assert below(tmp_path) == {}


def test_a_list_that_leads_elsewhere_is_refused(tmp_path: Path, server: Server) -> None:
    server.folder_prefix = "../"
    with pytest.raises(DataError, match="is not a path below a folder"):
        fetch_dataverse(tmp_path, server=server.url)


def test_servers_that_do_not_help(server: Server) -> None:
    with pytest.raises(DataError, match="answered 404"):
        list_dataverse(server.url, "doi:10.1/NONE")
    with pytest.raises(DataError, match="check the network"):
        list_dataverse("http://127.0.0.1:9", CHALLENGE_DOI)
    server.algorithm = "BLAKE2b"
    with pytest.raises(DataError, match="its API may have changed"):
        list_dataverse(server.url, CHALLENGE_DOI)


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_kaggle_gets_the_credentials_and_the_store_does_not(tmp_path: Path, server: Server) -> None:
    server.archive = zipped(FILES)
    server.cut["archive"] = 100
    paths = fetch_kaggle(tmp_path, "owner/wmh", (USER, KEY), server=server.url)
    assert below(tmp_path) == portable(FILES)
    assert len(paths) == len(FILES)
    assert {login for path, _, login in server.requests if path.startswith("/store")} == {None}
    assert json.loads((tmp_path / "source.json").read_text())["identifier"] == "owner/wmh"


def test_kaggle_refuses(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"401.*check the user name and the key") as caught:
        fetch_kaggle(tmp_path, "owner/wmh", (USER, "wrong"), server=server.url)
    assert "wrong" not in str(caught.value)
    with pytest.raises(DataError, match=r"404.*check OWNER/NAME"):
        fetch_kaggle(tmp_path, "owner/absent", (USER, KEY), server=server.url)
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        fetch_kaggle(tmp_path, "https://kaggle.com/x", (USER, KEY), server=server.url)
    with pytest.raises(DataError, match="answered 404") as lost:  # the store has no archive
        fetch_kaggle(tmp_path, "owner/wmh", (USER, KEY), server=server.url)
    assert "private" not in str(lost.value)


def test_a_bad_archive_is_not_kept(tmp_path: Path, server: Server) -> None:
    server.archive = zipped({"../up.txt": b"up"})
    with pytest.raises(DataError, match="is refused"):
        fetch_kaggle(tmp_path / "in", "owner/wmh", (USER, KEY), server=server.url)
    assert below(tmp_path) == {}


def test_credentials_are_the_users_own(tmp_path: Path) -> None:
    stored = tmp_path / ".kaggle" / "kaggle.json"
    with pytest.raises(ConfigError, match="set KAGGLE_USERNAME and KAGGLE_KEY"):
        kaggle_credentials({}, tmp_path)
    stored.parent.mkdir()
    stored.write_text(json.dumps({"username": "u", "key": "k"}))
    assert kaggle_credentials({}, tmp_path) == ("u", "k")
    assert kaggle_credentials({"KAGGLE_USERNAME": "a", "KAGGLE_KEY": "b"}, tmp_path) == ("a", "b")
    stored.write_text("[]")
    with pytest.raises(ConfigError, match="holds no Kaggle credentials"):
        kaggle_credentials({}, tmp_path)
