"""Read every import of the package from its syntax tree, and hold it against the layers that CONTRIBUTING draws.

``violations`` is the whole check. It runs on ``src/lading``, where it must find nothing, and on small trees with one
fault each, where it must find that fault: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lading"

_GROUND = {"errors", "units", "names", "compat"}
_BELOW_ADAPTERS = _GROUND | {"checkpoint", "placement", "recording", "residency", "embed"}
_BELOW_DOORS = _BELOW_ADAPTERS | {"adapters", "api"}

# Room → the rooms it may import besides itself. "" is the door, lading/__init__.py.
MAY_IMPORT = {
    **dict.fromkeys(_GROUND, _GROUND),
    **dict.fromkeys(("checkpoint", "placement", "recording"), _GROUND),
    "residency": _GROUND | {"checkpoint", "placement"},
    "embed": _GROUND | {"recording"},
    "adapters": _BELOW_ADAPTERS,
    "api": _BELOW_ADAPTERS | {"adapters"},
    "cli": _BELOW_DOORS | {""},
    "serve": _BELOW_DOORS | {""},
    "": _BELOW_DOORS,
    "__main__": _BELOW_DOORS | {"", "cli"},
}
# Third-party package → where it may be imported.
ONLY_IN = {
    **dict.fromkeys(
        ("accelerate", "bitsandbytes", "deepspeed", "flair", "peft", "ray", "sentence_transformers", "transformers"),
        "adapters/",
    ),
    **dict.fromkeys(("lance", "pyarrow"), "embed/store.py"),
    "highspy": "placement/anywhere.py",
    "matplotlib": "placement/picture.py",
}
VERSION_QUESTIONS = ("sys.version", "sys.platform", "torch.version.", "platform.", "os.name")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES, MAX_TOTAL_CODE_LINES = 400, 15_000


def module_name(path: Path, source: Path) -> str:
    """Name a file as an import would: ``lading.checkpoint.header``; an ``__init__`` bears its package's name."""
    parts = ["lading", *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Name the room of a module of lading: the first part below the package, '' for the door."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(path: Path, source: Path, modules: set[str]) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line: at any depth, also under TYPE_CHECKING and inside functions."""
    package = module_name(path, source)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:  # `from lading.cli import embed` imports a module, `… import main` a name of one
                name = f"{base}.{alias.name}"
                yield name if name in modules else base, node.lineno
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from ((str(name.value), node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


def called(call: ast.Call) -> str:
    """Name the called function without the modules before it."""
    return ast.unparse(call.func).rpartition(".")[2]


def version_branches(path: Path) -> Iterator[tuple[str, int]]:
    """Yield where code asks, outside a message, for the version of a package or of Python, or for the platform."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        asked = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if isinstance(node, ast.Call):  # importlib.metadata.version(…); of lading itself anybody may ask
            is_question = called(node) == "version" and not asked.endswith("version('lading')")
        else:
            is_question = asked.endswith(".__version__") or asked.startswith(VERSION_QUESTIONS)
        if is_question and node not in said and asked != "lading.__version__":
            yield asked, node.lineno


def cycles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """Yield each cycle between files once, as a chain of module names."""
    state: dict[str, str] = {}
    chain: list[str] = []

    def visit(module: str) -> Iterator[str]:
        state[module] = "open"
        chain.append(module)
        for target in sorted(arrows.get(module, ())):
            if state.get(target) == "open":
                yield " → ".join([*chain[chain.index(target) :], target])
            elif target not in state:
                yield from visit(target)
        state[module] = "done"
        chain.pop()

    for module in sorted(arrows):
        if module not in state:
            yield from visit(module)


def code_lines(path: Path) -> int:
    """Count the lines that hold code; prose is free, or the limit would be kept by deleting explanations."""
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and n not in prose for n, line in lines)


def violations(source: Path) -> list[str]:
    """Find everything under a package's folder that breaks the shape of the house; an empty list is a clean house."""
    files = sorted(source.rglob("*.py"))
    modules = {module_name(path, source) for path in files}
    found: list[str] = []
    arrows: dict[str, set[str]] = {}
    total = 0
    for path in files:
        where, module = path.relative_to(source).as_posix(), module_name(path, source)
        room, lines = room_of(module), len(path.read_text(encoding="utf-8").splitlines())
        total += code_lines(path)
        if lines > MAX_LINES:
            found.append(f"{where}: {lines} lines, at most {MAX_LINES}")
        if path.stem in VAGUE_NAMES:
            found.append(f"{where}: a file is named for one concept")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{where}: no docstring says what the file does")
        if room not in MAY_IMPORT:
            found.append(f"{where}: {room!r} is no room of the house; draw it in MAY_IMPORT first")
            continue
        for target, line in imports_of(path, source, modules):
            top = target.partition(".")[0]
            home = ONLY_IN.get(top)
            if home is not None and not where.startswith(home):
                found.append(f"{where}:{line}: imports {top}, which only {home} may")
            if top == "lading":
                arrows.setdefault(module, set()).add(target)
                if room_of(target) != room and room_of(target) not in MAY_IMPORT[room]:
                    found.append(f"{where}:{line}: {room or 'the door'} may not import {target}")
        if where != "compat.py":
            found.extend(
                f"{where}:{line}: {asked}: version branches stand in compat.py"
                for asked, line in version_branches(path)
            )
    if total > MAX_TOTAL_CODE_LINES:
        found.append(f"{total} lines of code in all, at most {MAX_TOTAL_CODE_LINES}")
    return found + [f"cycle: {chain}" for chain in cycles(arrows)]


def test_layers_of_the_package_hold():
    assert violations(SOURCE) == []


def test_layers_reads_the_package_and_not_an_empty_folder():
    rooms = {room_of(module_name(path, SOURCE)) for path in SOURCE.rglob("*.py")}
    assert {"", "errors", "units", "checkpoint", "embed", "adapters", "api", "cli"} <= rooms


CLEAN = {
    "__init__.py": '"""Door."""\nfrom lading.api import load\n',
    "errors.py": '"""Errors."""\n',
    "compat.py": '"""Versions."""\nimport sys, torch\nOLD = torch.__version__ < "3" or sys.version_info < (3, 12)\n',
    "checkpoint/__init__.py": '"""Room."""\nfrom lading.checkpoint.header import read\n',
    "checkpoint/header.py": '"""Header."""\nfrom lading.errors import LadingError\n\ndef read(): ...\n',
    "recording/__init__.py": '"""Room."""\n',
    "residency/__init__.py": '"""Room."""\nfrom lading import checkpoint, errors\n',
    "embed/__init__.py": '"""Room."""\nimport lading.recording\n',
    "embed/store.py": '"""Store."""\nimport lance\nimport pyarrow.compute as pc\n',
    "adapters/transformers.py": '"""Adapter."""\nimport transformers\nfrom ..checkpoint import header\n'
    'SAID = f"transformers {transformers.__version__} lacks it"\n',
    "api/__init__.py": '"""Compose."""\nfrom lading.adapters import transformers\n\ndef load(): ...\n',
    "cli/__init__.py": '"""Shell."""\nimport lading\nfrom lading.cli import embed\nV = lading.__version__\n',
    "cli/embed.py": '"""Embed."""\n\ndef run():\n    from lading.api import load\n',
}

FAULTS = {
    "ground floor looks up": ("errors.py", "from lading import recording", "errors may not import"),
    "rooms know each other": (
        "checkpoint/a.py",
        "import lading.recording",
        "checkpoint may not import lading.recording",
    ),
    "residency knows embed": ("residency/a.py", "from lading import embed", "residency may not import lading.embed"),
    "embed knows residency": ("embed/a.py", "from ..residency import x", "embed may not import lading.residency"),
    "adapters know api": ("adapters/a.py", "from lading.api import load", "adapters may not import lading.api"),
    "api knows cli": ("api/a.py", "from lading.cli import main", "api may not import lading.cli"),
    "a room knows the door": ("checkpoint/a.py", "from lading import load", "checkpoint may not import lading"),
    "inside a function": ("embed/a.py", "def f():\n    import lading.api", "embed may not import lading.api"),
    "for types only": (
        "checkpoint/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lading.api import load",
        "checkpoint may not import lading.api",
    ),
    "by name": (
        "embed/a.py",
        "import importlib\nimportlib.import_module('lading.api')",
        "embed may not import lading.api",
    ),
    "heavy package": (
        "api/a.py",
        "from transformers import AutoModel",
        "imports transformers, which only adapters/ may",
    ),
    "heavy submodule": ("embed/a.py", "import flair.data", "imports flair, which only adapters/ may"),
    "store library": ("embed/a.py", "import pyarrow as pa", "imports pyarrow, which only embed/store.py may"),
    "version branch": (
        "embed/a.py",
        "import torch\nif torch.__version__ > '3': ...",
        "torch.__version__: version branches",
    ),
    "metadata branch": ("embed/a.py", "import importlib.metadata as m\nm.version('torch')", "m.version('torch')"),
    "platform branch": (
        "embed/a.py",
        "import sys\nIS_MAC = sys.platform == 'darwin'",
        "sys.platform: version branches",
    ),
    "cycle in a room": (
        "checkpoint/header.py",
        "from lading.checkpoint import read",
        "cycle: lading.checkpoint.header → lading.checkpoint →",
    ),
    "unknown room": ("engine/__init__.py", "", "'engine' is no room"),
    "vague name": ("embed/utils.py", "", "named for one concept"),
    "long file": ("embed/a.py", "x = 1\n" * 399, "401 lines, at most 400"),
}


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "lading" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "lading"


def test_layers_of_a_clean_sample_hold(tmp_path):
    assert violations(write_tree(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_layers_of_a_sample_with_one_fault_are_refused(tmp_path, fault):
    name, code, message = FAULTS[fault]
    found = violations(write_tree(tmp_path, {**CLEAN, name: f'"""Sample."""\n{code}\n'}))
    assert len(found) == 1, found
    assert message in found[0]


def test_layers_of_a_file_without_docstring_are_refused(tmp_path):
    found = violations(write_tree(tmp_path, {**CLEAN, "embed/a.py": "x = 1\n"}))
    assert found == ["embed/a.py: no docstring says what the file does"]


def test_layers_of_a_package_too_long_to_read_are_refused(tmp_path):
    files = {f"embed/part{index}.py": '"""Part."""\n' + "x = 1\n" * 390 for index in range(40)}
    found = violations(write_tree(tmp_path, {**CLEAN, **files}))
    assert len(found) == 1
    assert "lines of code in all, at most 15000" in found[0]
