"""Build a model large enough that its blocks stream: a chain of wide layers, in memory or in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chain import Chain, seeded
from safetensors.torch import save_file

import lading


@pytest.fixture(scope="session")
def chain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's weights in one file; no test writes to it."""
    path = tmp_path_factory.mktemp("chain") / "model.safetensors"
    save_file(seeded(Chain()).state_dict(), path)
    return path


@pytest.fixture
def mapped_chain(chain_file: Path) -> Callable[..., Chain]:
    """Return a function that maps a new chain from the file, or from another one."""

    def make(path: Path = chain_file) -> Chain:
        with lading.empty():
            model = Chain()
        lading.load_into(model, path)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, Chain.WIDTH, generator=torch.Generator().manual_seed(1))
