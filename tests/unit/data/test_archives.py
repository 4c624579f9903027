"""ZIP archives as they should be, and as an attacker or a bad disk makes them."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from wmh_lora.data.archives import extract_zip, safe_path
from wmh_lora.errors import DataError


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return path


def below(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    return folder


def test_files_arrive(tmp_path: Path, out: Path) -> None:
    members = {"a/b/c.txt": b"c" * 5000, "d.txt": b"", "e/": b""}
    paths = extract_zip(archive(tmp_path / "x.zip", members), out)
    assert below(out) == {"a/b/c.txt": b"c" * 5000, "d.txt": b""}
    assert [str(path) for path in paths] == ["a/b/c.txt", "d.txt"]


def test_extraction_can_be_repeated_but_replaces_nothing(tmp_path: Path, out: Path) -> None:
    source = archive(tmp_path / "x.zip", {"a.txt": b"aaa", "b.txt": b"bbb"})
    extract_zip(source, out)
    (out / "b.txt").unlink()
    extract_zip(source, out)
    assert below(out) == {"a.txt": b"aaa", "b.txt": b"bbb"}
    (out / "a.txt").write_bytes(b"xxx")  # of the same size
    with pytest.raises(DataError, match="differs from the archive's"):
        extract_zip(source, out)
    assert (out / "a.txt").read_bytes() == b"xxx"


@pytest.mark.parametrize(
    "name", ["../up.txt", "a/../../up.txt", "/etc/up.txt", "C:/up.txt", "a\\..\\..\\up.txt", "a/."]
)
def test_paths_that_lead_elsewhere_are_refused_before_anything_is_written(
    tmp_path: Path, out: Path, name: str
) -> None:
    source = tmp_path / "x.zip"
    with zipfile.ZipFile(source, "w") as opened:
        opened.writestr("good.txt", b"good")
        opened.writestr(zipfile.ZipInfo(name), b"bad")
    with pytest.raises(DataError, match="is refused"):
        extract_zip(source, out)
    assert below(tmp_path) == {"x.zip": source.read_bytes()}


def test_links_and_doubles_are_refused(tmp_path: Path, out: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        extract_zip(tmp_path / "link.zip", out)
    with pytest.raises(DataError, match="twice"):
        extract_zip(archive(tmp_path / "two.zip", {"a.txt": b"", "A.txt": b""}), out)
    assert below(out) == {}


def test_a_bomb_is_refused_by_what_it_announces(tmp_path: Path, out: Path) -> None:
    source = archive(tmp_path / "x.zip", {"zeros": bytes(1_000_001)})
    assert source.stat().st_size < 2000
    with pytest.raises(DataError, match="1 files of 1,000,001 bytes"):
        extract_zip(source, out, max_bytes=1_000_000)
    assert below(out) == {}


def test_a_bomb_that_lies_is_stopped_where_it_said_it_would_end(tmp_path: Path, out: Path) -> None:
    source = archive(tmp_path / "x.zip", {"zeros": bytes(100_000)})
    data = bytearray(source.read_bytes())
    for at in (22, data.index(b"PK\x01\x02") + 24):  # size in the local and the central header
        data[at : at + 4] = (10).to_bytes(4, "little")
    source.write_bytes(data)
    with pytest.raises(DataError, match="damaged archive"):
        extract_zip(source, out)
    assert below(out) == {}


@pytest.mark.parametrize("damage", ["byte", "cut"])
def test_damage_is_noticed(tmp_path: Path, out: Path, damage: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        opened.writestr("a.txt", bytes(range(256)) * 20)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    if damage == "byte":
        data[100] ^= 1
    else:
        del data[2000:]
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match="damaged archive"):
        extract_zip(tmp_path / "x.zip", out)
    assert below(out) == {}


@pytest.mark.parametrize("name", ["", ".", "..", "a//b", "/a", "a/..", "a:b", "a\nb", "a/ /b"])
def test_unsafe_paths(name: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        safe_path(name)
