"""What every test shares: few threads, explicit generators, and the way to the real scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from wmh_lora.logs import LOGGER

# Times vary too much on a shared machine for deadlines; the same examples every time make a
# failure reproducible from its log alone.
settings.register_profile("wmh_lora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("wmh_lora")

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _two_torch_threads() -> None:
    """Small tensors gain nothing from more threads."""
    torch.set_num_threads(2)


_LIBRARY_LOGGING = (tuple(LOGGER.handlers), LOGGER.level)


@pytest.fixture(autouse=True)
def _logging_of_a_library() -> None:
    """The command line sets up logging for its process; each test begins as a library user."""
    handlers, level = _LIBRARY_LOGGING
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy generator with the same stream in every test."""
    return np.random.default_rng(20170901)


@pytest.fixture
def torch_generator() -> torch.Generator:
    """CPU torch generator with the same stream in every test."""
    return torch.Generator().manual_seed(20170901)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans beside the repository; tests that use it are marked ``realdata``."""
    folder = _REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real scans (../shared/data) are not on this machine")
    return folder
