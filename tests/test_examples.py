"""Run every example as a reader would: from an empty folder, offline, with nothing but its own file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
NEEDS = {"gradio_app.py": "gradio"}
RUNNABLE = [pytest.param(path, marks=pytest.mark.needs(*NEEDS.get(path.name, "").split())) for path in EXAMPLES]


def test_examples_exist():
    assert any(path.name == "demo.py" for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_say_what_they_show(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_examples_run_to_the_end(path, tmp_path):
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip()
    assert "Traceback" not in result.stderr
