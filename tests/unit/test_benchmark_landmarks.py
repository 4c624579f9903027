"""The landmark benchmark counts what preprocessing finds, on scans whose white matter is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.landmarks import main


def test_scans_are_counted_by_lesion_volume_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--scans", "2", "--seed", "1005"])
    document = json.loads(capsys.readouterr().out)
    assert document["scans"] == 2
    assert [group["scans"] for group in document["off"]] == [1, 0, 1]  # 93 and 0 mL
    for version in (2, 3):
        assert [group[f"version {version}"] for group in document["off"]] == [0, 0, 0]
    assert document["which"] == []


def test_label_maps_need_a_cache(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--labelmaps", str(tmp_path)])
