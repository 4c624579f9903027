"""Every command that trains prepares its process, before torch is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.processes import fresh_python
from wmh_lora.cli import training_process
from wmh_lora.cli.main import cli


class _PreparedError(Exception):
    """Ends a command where it begins to train."""


def test_sets_what_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(training_process, "keep_freed_memory", lambda: calls.append(None))
    environment = {"OMP_WAIT_POLICY": "active"}
    monkeypatch.setattr(os, "environ", environment)
    training_process.prepare_for_training()
    assert environment == {"OMP_WAIT_POLICY": "active", "OPENBLAS_NUM_THREADS": "1"}
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", ("train", "compact-synthetic")),
        ("adapt", ("adapt", "--images", ".", "--labels", ".", "-o", "x.safetensors")),
        ("compare", ("compare", "small", "-o", "out")),
    ],
)
def test_commands_that_train_call_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, arguments: tuple[str, ...]
) -> None:
    def prepared() -> None:
        raise _PreparedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"wmh_lora.cli.{module}.prepare_for_training", prepared)
    result = CliRunner().invoke(cli, arguments)
    assert "_PreparedError" in result.output


def test_it_loads_no_torch() -> None:
    code = """
import sys
from wmh_lora.cli.training_process import prepare_for_training
prepare_for_training()
print("torch" in sys.modules)
"""
    assert fresh_python(code).stdout.strip() == "False"
