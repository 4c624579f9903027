"""Memory that comes and goes: kept by the process where the C library can."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from tests.processes import fresh_python
from wmh_lora.models.allocator import keep_freed_memory

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def _afresh() -> None:
    keep_freed_memory.cache_clear()


_COUNT_FAULTS = """
import resource
import torch
from wmh_lora.models.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**22)  # 16 MB, 4096 pages each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(keep_freed_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(not GLIBC, reason="only glibc has this setting")
def test_large_blocks_are_not_faulted_in_again() -> None:
    in_effect, faults = fresh_python(_COUNT_FAULTS).stdout.split()
    assert in_effect == "True"
    assert int(faults) < 4096  # less than one of the eight blocks


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
