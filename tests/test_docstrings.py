"""Run the examples in every docstring of the package, each file's from an empty folder."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import lading

SOURCE = Path(lading.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__main__.py")


def as_parameter(path: Path):
    parts = ["lading", *path.relative_to(SOURCE).with_suffix("").parts]
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return pytest.param(name, id=name, marks=pytest.mark.transformers5 if "transformers5" in name else ())


@pytest.mark.parametrize("name", [as_parameter(path) for path in FILES])
def test_docstrings_of_a_module_hold_examples_that_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(name for name in lading.__all__ if not name.startswith("__")))
def test_docstrings_of_public_names_carry_an_example(name):
    value = getattr(lading, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        assert inspect.getdoc(value)
    else:
        assert ">>> " in (inspect.getdoc(value) or ""), f"lading.{name}: no example in its docstring"
