"""Prove that importing lading changes nothing in the process, and that its door lists what it offers.

Each test asks a fresh interpreter: in this one pytest and torch have changed plenty already.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from lading import errors

PUBLIC = {"load", "load_into", "empty", "plan", "Embedder", "VectorStore", "LoadReport"}
PUBLIC |= {"Plan", "PlanWarning", "Workload", "Bandwidths", "offload", "Residency", "ResidencyStats", "capture"}
PUBLIC |= {"convoy", "Convoy", "ConvoyStats"}
ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}

# What a process is like, before and after; `gc` and `sys.path` stand for "no hook was left behind".
STATE = """
import gc, json, locale, logging, os, signal, sys, threading, warnings

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "lading handlers": [repr(handler) for handler in logging.getLogger("lading").handlers],
        "warning filters": [str(entry) for entry in warnings.filters],
        "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "hooks": [str(hook) for hook in (sys.excepthook, threading.excepthook, sys.displayhook, *sys.meta_path)],
        "path": list(sys.path),
        "path hooks": [str(hook) for hook in sys.path_hooks],
        "collector": gc.get_threshold(),
        "locale": locale.setlocale(locale.LC_ALL),
        "switch interval": sys.getswitchinterval(),
        "recursion limit": sys.getrecursionlimit(),
    }
"""


def run_fresh(code: str):
    """Run code in a fresh interpreter and return what it prints last, read as JSON."""
    hidden = "import sys; sys.modules['torchao'] = None\n"  # it tells standard error what it cannot load
    result = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout.splitlines()[-1])


def test_import_changes_nothing_in_the_process():
    before, after = run_fresh(f"{STATE}\nbefore = state()\nimport lading\nprint(json.dumps([before, state()]))")
    assert after == before


@pytest.mark.parametrize("module", ["lading", "lading.cli", "lading.checkpoint", "lading.embed", "lading.errors"])
def test_import_loads_neither_torch_nor_what_is_heavy(module):
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "highspy",
        "lance",
        "matplotlib",
        "pyarrow",
        "accelerate",
        "tqdm",
    }
    loaded = run_fresh(f"import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))")
    assert heavy.isdisjoint(loaded)


def test_import_lists_the_public_names_without_loading_them():
    listed, is_torch_loaded = run_fresh(
        "import json, sys, lading\nprint(json.dumps([dir(lading), 'torch' in sys.modules]))"
    )
    assert set(listed) >= PUBLIC | ERRORS
    assert not is_torch_loaded


def test_import_star_agrees_with_the_listing():
    public, exported = run_fresh(
        "import json, lading\n"
        "names = {}\nexec('from lading import *', names)\nnames.pop('__builtins__')\n"
        "public = [name for name in lading.__all__ if not name.startswith('__')]\n"
        "print(json.dumps([sorted(public), sorted(name for name in names if not name.startswith('__'))]))"
    )
    assert public == exported
    assert set(public) == PUBLIC | ERRORS


@pytest.mark.parametrize("name", sorted(PUBLIC | ERRORS))
def test_import_of_each_public_name_gives_something_documented(name):
    import lading

    assert inspect.getdoc(getattr(lading, name))


def test_import_of_an_unknown_name_raises():
    import lading

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lading.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from lading import no_such_name")


def test_import_shows_the_installed_version():
    import lading

    assert run_fresh("import json, lading\nprint(json.dumps(lading.__version__))") == lading.__version__
