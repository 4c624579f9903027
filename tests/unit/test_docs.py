"""What the documentation tells can be done: Python runs, options exist, links lead on."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tests.bids_trees import write_dataset
from tests.followed_heads import FIRST, MOVED, SECOND, coarse_visit
from tests.phantoms import brightness_model, head, write_head
from tests.small_models import small_model
from wmh_lora.cli.main import cli
from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import write_manifest
from wmh_lora.models.export import FORMATS, export_model
from wmh_lora.volume import write_nifti

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("interfaces/*.md")])
SLOW = ("docs/export.md", "docs/longitudinal.md")  # four exports; a registration
EXPORTS = {
    "onnx": "wmh.onnx",
    "openvino": "wmh.xml",
    "torchscript": "wmh.ts",
    "monai-bundle": "wmh-bundle",
}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_of(page: Path) -> list[str]:
    """Its fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Words after ``wmh-lora`` of each command in its blocks, indented or fenced."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```(python|json)\n.*?^```", "", text, flags=re.M | re.S)
    blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", text, re.M | re.S)
    for line in re.sub(r"\\\n\s*", "", "\n".join(map("".join, blocks))).splitlines():
        found = re.search(r"(?:wmh-lora|-m wmh_lora|wmh-lora\.sif) +([a-z-][^/]*( .*)?)$", line)
        if found:
            yield shlex.split(re.split(r" #|\s{3}", found[1])[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with scans under the names that the pages use."""
    for name in ("wmh_lora.load_model", "wmh_lora.engine.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: brightness_model())
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    return tmp_path


def prepare(page: str, folder: Path) -> dict[str, Any]:
    """Make what a page presumes; return the names that it uses without defining them."""
    volume, mask = head()
    if page == "docs/longitudinal.md":
        for name, lesions, moved in (("ses-1", FIRST, None), ("ses-2", SECOND, MOVED)):
            scan = coarse_visit(name, lesions, moved).volume
            write_nifti(folder / f"sub-01_{name}_FLAIR.nii.gz", scan.data, scan)
    if page == "docs/bids.md":
        write_dataset(folder / "study", "sub-01_ses-1_FLAIR")
        words = ["bids", "study", "study/derivatives/wmh-lora", "participant", "--device", "cpu"]
        assert CliRunner().invoke(cli, words).exit_code == 0
    if page == "docs/data.md":
        write_head(folder / "scans" / "sub-01_FLAIR.nii.gz")
        write_nifti(folder / "scans" / "sub-01_mask.nii.gz", mask, volume)
        write_manifest(make_manifest(folder / "scans"), folder / "manifest.json")
    if page == "docs/export.md":
        for kind in FORMATS:
            export_model(small_model(), folder / EXPORTS[kind], kind)
        return {"slices": np.zeros((1, 3, 64, 48), np.float32)}
    if page == "docs/regions.md":
        ventricles, brain = np.zeros_like(mask), (volume.data > 150).astype(np.uint8)
        ventricles[21:27, 20:36, 2:4] = 1
        return {
            "mask": mask,
            "affine": volume.affine,
            "ventricles": ventricles,
            "brain": brain,
        }
    return {}


def pages_with_python() -> Iterator[Any]:
    for page in PAGES:
        if python_of(page):
            name = page_name(page)
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")  # MONAI's own call
@pytest.mark.parametrize("page", [*pages_with_python()])
def test_python_runs(page: Path, folder: Path) -> None:
    """All blocks of a page in one namespace, in a folder that has what the page presumes."""
    names = {"__name__": "page", **prepare(page_name(page), folder)}
    for block in python_of(page):
        exec(compile(block, page_name(page), "exec"), names)  # noqa: S102 -- our own pages


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands_of(page))], ids=page_name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands_of(page):
        command, rest = find_command(words)
        known = {name: option for option in command.params for name in spellings(option)}
        for place, word in enumerate(rest):
            if not re.match(r"--?[a-z]", word):
                continue
            name, _, value = word.partition("=")
            assert name in known, f"{' '.join(words)}: {command.name} has no {name}"
            kind = known[name].type
            if isinstance(kind, click.Choice) and "|" not in (value or rest[place + 1]):
                assert (value or rest[place + 1]) in kind.choices, " ".join(words)


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Follow the words to the command that they name."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        options = [word for word in words if not word.startswith("-")]
        if not options:
            break
        found = command.get_command(context, options[0])
        assert found is not None, f"there is no command {options[0]!r}: {' '.join(words)}"
        command, words = found, words[words.index(options[0]) + 1 :]
    return command, words


def spellings(option: click.Parameter) -> list[str]:
    return [*option.opts, *option.secondary_opts, "-h", "--help"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [
        target
        for target in targets
        if "://" not in target and not (page.parent / target).resolve().exists()
    ]
    assert missing == []


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    commands = (tmp_path / "site" / "cli" / "index.html").read_text(encoding="utf-8")
    for name in cli.list_commands(click.Context(cli)):
        assert f"Usage: wmh-lora {name}" in commands
