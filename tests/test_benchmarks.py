"""Run every benchmark in its smallest size, so that none of them rots. What it measures proves nothing here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("bench_*.py"))


def test_benchmarks_exist():
    assert any(path.name == "bench_load.py" for path in SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmarks_state_question_ceiling_and_peer(path):
    stated = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "?" in stated
    for word in ("ceiling", "peer"):
        assert word in stated.lower(), f"the docstring names no {word}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmarks_at_tiny_size_end_in_one_line_of_json(path, tmp_path):
    result = subprocess.run(
        [sys.executable, str(path), "--tiny"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert isinstance(json.loads(result.stdout.splitlines()[-1]), dict)


def test_benchmarks_reports_belong_to_a_script():
    stems = {path.stem for path in SCRIPTS}
    for report in (FOLDER / "results").glob("*.md"):
        text = report.read_text(encoding="utf-8")
        assert any(report.stem.startswith(stem) for stem in stems), report.name
        assert "python benchmarks/" in text, f"{report.name} does not say by which command it was made"
        assert "torch 2" in text, f"{report.name} does not say with which versions it was made"
