"""What other tools read about this one agrees with the package: versions, options, dependencies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.processes import fresh_python
from tools.build_boutiques import TARGET, descriptor
from wmh_lora import __version__
from wmh_lora.config_reading import read_toml

ROOT = Path(__file__).resolve().parents[2]
INTERFACES = ROOT / "interfaces"
PROJECT = read_toml(ROOT / "pyproject.toml")["project"]
DOCKERFILE = (INTERFACES / "docker" / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (INTERFACES / "apptainer" / "wmh-lora.def").read_text(encoding="utf-8")
ON_CONDA = {"torch": "pytorch"}


def read_yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


RECIPE = read_yaml(INTERFACES / "conda" / "recipe.yaml")
CITATION = read_yaml(ROOT / "CITATION.cff")
BOUTIQUES: dict[str, Any] = json.loads(TARGET.read_text(encoding="utf-8"))


def test_versions_are_that_of_the_package() -> None:
    found = (RECIPE["context"]["version"], CITATION["version"], BOUTIQUES["tool-version"])
    assert found == (__version__,) * 3


class TestBoutiques:
    def test_descriptor_is_up_to_date(self) -> None:
        assert descriptor() == BOUTIQUES, "run python tools/build_boutiques.py"

    def test_command_line_and_inputs_agree(self) -> None:
        keys = re.findall(r"\[[A-Z0-9_]+\]", BOUTIQUES["command-line"])
        inputs = BOUTIQUES["inputs"]
        assert len(set(keys)) == len(keys)
        assert sorted(keys) == sorted(entry["value-key"] for entry in inputs)
        assert keys[:3] == ["[BIDS_DIR]", "[OUTPUT_DIR]", "[ANALYSIS_LEVEL]"]
        ids = [entry["id"] for entry in inputs]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch(r"\w+", name) for name in ids)
        members = [name for group in BOUTIQUES["groups"] for name in group["members"]]
        assert set(members) <= set(ids)

    def test_its_command_is_understood(self, tmp_path: Path) -> None:
        """Every option at once, with a value as the descriptor describes it."""
        from wmh_lora.cli.bids import bids

        file = tmp_path / "file"
        file.touch()
        words = [str(tmp_path), str(tmp_path / "out"), "participant"]
        for entry in BOUTIQUES["inputs"]:
            if "command-line-flag" in entry:
                words += [entry["command-line-flag"], *example(entry, file)]
        context = bids.make_context("bids", words)
        assert context.params["participants"] == ("text", "text")
        assert context.params["adaptive"] is False  # the later of the two flags
        assert context.params["overwrite"] is True


def example(entry: dict[str, Any], file: Path) -> list[str]:
    """Values that an input of the descriptor may take."""
    if entry["type"] == "Flag":
        return []
    if entry["type"] == "File":
        return [str(file)]
    if entry["type"] == "Number":
        low = entry["minimum"]
        return [str(low + 1) if entry["integer"] else str((low + entry["maximum"]) / 2)]
    return ["text", "text"] if entry.get("list") else [entry.get("value-choices", ["text"])[0]]


class TestConda:
    def test_dependencies_are_those_of_pyproject(self) -> None:
        expected = {}
        for requirement in PROJECT["dependencies"]:
            match = re.fullmatch(r"([\w.-]+)(>=[\d.]+)(; .*)?", requirement)
            assert match is not None, requirement
            expected[ON_CONDA.get(match[1], match[1])] = match[2]
        python, *run = RECIPE["requirements"]["run"]
        assert dict(entry.split(" ") for entry in run) == expected
        assert python == "python >=${{ python_min }}"
        assert f">={RECIPE['context']['python_min']}" == PROJECT["requires-python"]

    def test_build_and_entry_points(self) -> None:
        build_tools = read_toml(ROOT / "pyproject.toml")["build-system"]["requires"]
        host = [entry.replace(" ", "") for entry in RECIPE["requirements"]["host"]]
        assert set(build_tools) <= set(host)
        scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
        assert RECIPE["build"]["python"]["entry_points"] == scripts
        assert RECIPE["about"]["license"] == PROJECT["license"]
        assert RECIPE["about"]["summary"] == PROJECT["description"]


class TestContainers:
    def test_dockerfile_passes_hadolint(self) -> None:
        program = Path(sys.executable).with_name("hadolint")
        path = INTERFACES / "docker" / "Dockerfile"
        finished = subprocess.run([program, path], capture_output=True, text=True, check=False)
        assert (finished.returncode, finished.stdout) == (0, "")

    def test_dockerfile_runs_the_command_as_nobody_special(self) -> None:
        final = DOCKERFILE.split("\nFROM ")[-1]
        assert 'ENTRYPOINT ["wmh-lora"]' in final
        users = re.findall(r"^USER (\S+)", final, flags=re.MULTILINE)
        assert users
        assert users[-1] not in ("root", "0")

    @pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=["docker", "apptainer"])
    def test_pins_are_those_of_make(self, recipe: str) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        weights = re.search(r"^BASE_WEIGHTS := (\S+)", makefile, flags=re.MULTILINE)
        assert weights is not None
        assert f"BASE_WEIGHTS={weights[1]}\n" in recipe
        assert "-c constraints.txt" in recipe
        version = re.search(r"PYTHON_VERSION=(\S+)", recipe)
        assert version is not None
        assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]

    @pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=["docker", "apptainer"])
    def test_everything_copied_is_there(self, recipe: str) -> None:
        copied = re.search(r"^COPY (pyproject.*) \./$", recipe, flags=re.MULTILINE)
        files = re.findall(r"^ {4}(\S+) /build/", recipe, flags=re.MULTILINE)
        names = [*(copied[1].split() if copied else files), "src"]
        assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(names)
        assert all((ROOT / name).exists() for name in names)
        ignore = (INTERFACES / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
        assert {line[1:] for line in ignore.splitlines() if line.startswith("!")} == set(names)

    def test_apptainer_has_its_sections(self) -> None:
        sections = re.findall(r"^%(\w+)", APPTAINER, flags=re.MULTILINE)
        assert len(set(sections)) == len(sections)
        assert {"arguments", "files", "post", "environment", "runscript", "test"} <= set(sections)
        assert APPTAINER.count('exec wmh-lora "$@"') == 1
        declared = set(re.findall(r"^ {4}([A-Z_]+)=", APPTAINER, flags=re.MULTILINE))
        assert set(re.findall(r"\{\{ (\w+) \}\}", APPTAINER)) == declared


def test_citation_names_the_package_and_no_person() -> None:
    # cffconvert --validate checks the whole; it cannot be installed beside a recent jsonschema
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["message"]
    assert CITATION["type"] == "software"
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["keywords"] == PROJECT["keywords"]


class TestCompletion:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("wmh-lora seg", {"segment"}),
            ("wmh-lora bids --tta ", {"none", "flip", "d4"}),
            ("wmh-lora bids . out ", {"participant", "group"}),
            ("wmh-lora bids --bids-f", {"--bids-filter-file"}),
        ],
    )
    def test_words_are_completed(self, line: str, expected: set[str]) -> None:
        words = line.split(" ")
        code = (
            "import os, sys; "
            f"os.environ.update(_WMH_LORA_COMPLETE='zsh_complete', COMP_WORDS={line!r}, "
            f"COMP_CWORD='{len(words) - 1}'); "
            "from wmh_lora.cli.main import main\n"
            "try:\n    main()\n"
            "finally:\n    assert 'torch' not in sys.modules, 'completion must answer at once'"
        )
        finished = fresh_python(code)
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()
        assert {lines[index] for index in range(1, len(lines), 3)} == expected

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_a_script_for_each_shell(self, shell: str) -> None:
        code = (
            f"import os; os.environ['_WMH_LORA_COMPLETE'] = '{shell}_source'; "
            "from wmh_lora.cli.main import main; main()"
        )
        finished = fresh_python(code)
        assert finished.returncode == 0, finished.stderr
        assert "_WMH_LORA_COMPLETE" in finished.stdout
        assert f"{shell}_complete" in finished.stdout
