"""Run a short suite on each release of transformers and torch that lading promises; called by `make test-matrix`.

    python3 requirements/matrix.py                        # every transformers of RELEASES, with the torch of .venv-t5
    python3 requirements/matrix.py 5.10.4                 # one of them, or any other
    python3 requirements/matrix.py 5.24.0+torch2.14.1     # with another torch: gigabytes, deleted after its run

A release is an overlay: a virtual environment that holds that transformers and those of its requirements that differ,
with the packages of .venv-t5 behind it (`make env`). Another torch gets an environment of its own. What ran is written
into the table of docs/versions.md, release × area.
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
RELEASES = ("4.57.6", "5.0.0", "5.10.4", "5.20.2", "5.23.0", "5.24.0")
ENVIRONMENTS = {"4.57.6": ".venv-t4", "5.24.0": ".venv-t5"}
"""Those that `make env` makes."""
TOOLS = ("accelerate", "hypothesis", "numpy", "pytest", "pytest-xdist", "safetensors", "tqdm")
"""What the suite needs beside torch and transformers."""

AREAS = {
    "loading": [
        "tests/adapters/test_transformers_zoo.py::test_load_any_architecture_equals_the_model_that_was_saved",
        "tests/adapters/test_transformers_zoo.py::test_load_sharded_equals_from_pretrained",
        "tests/adapters/test_transformers_zoo.py::test_load_names_of_older_releases_equals_from_pretrained",
        "tests/adapters/test_skeleton.py::test_skeleton_of_any_architecture_is_the_loaded_model",
    ],
    "offload": [
        "tests/api/test_offloading.py",
        "tests/residency/test_laws_on_cpu.py::test_outputs_have_the_same_bits_under_every_budget",
        "tests/residency/test_laws_on_cpu.py::test_generation_with_a_cache_gives_the_same_tokens",
    ],
    "capture": [
        "tests/recording/test_capture_zoo.py::test_plain_sites_see_every_hidden_state_that_the_flag_returns",
        "tests/recording/test_declared_groups.py",
    ],
    "flags": [
        "tests/adapters/test_transformers_releases.py",
        "tests/adapters/test_thread_safe_outputs_in_threads.py",
        "tests/adapters/test_thread_safe_outputs.py",
    ],
    "workload": ["tests/adapters/test_transformers_workload.py"],
}


def python_of(folder: Path) -> Path:
    """Give an environment's interpreter."""
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    """Install into an environment with the pip of this interpreter's own making; report what pip says on failure."""
    tool = python_of(ROOT / ".venv-t5")
    command = [str(tool), "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip failed for {' '.join(arguments)}:\n{done.stderr}")


def environment(transformers: str, torch: str | None) -> Path:
    """Make an environment, or find it whole; half of one is made anew."""
    if torch is None and transformers in ENVIRONMENTS:
        return ROOT / ENVIRONMENTS[transformers]
    folder = ROOT / f".venv-matrix-{transformers}{f'-torch{torch}' if torch else ''}"
    made = folder / ".made"
    if made.is_file():
        return folder
    print(f"{folder.name}: making it", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    if torch is None:
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        places = [
            subprocess.check_output([python_of(each), "-c", ask], text=True).strip()
            for each in (ROOT / ".venv-t5", folder)
        ]
        Path(places[1], "behind.pth").write_text(places[0] + "\n", encoding="utf-8")
        pip(python_of(folder), f"transformers=={transformers}")  # and what of .venv-t5 does not fit it
    else:
        pip(python_of(folder), f"torch=={torch}", f"transformers=={transformers}", *TOOLS)
    made.touch()
    return folder


def run(folder: Path) -> tuple[str, str, dict[str, str]]:
    """Run the suite; give the versions of transformers and torch, and each area's outcome."""
    report = folder / "matrix.xml"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    tests = [test for area in AREAS.values() for test in area]
    options = ["-m", "not full", "-n", "2", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    with (folder / "matrix.log").open("w") as log:
        subprocess.run([python_of(folder), "-m", "pytest", *options, *tests], cwd=ROOT, env=variables, stdout=log,
                       stderr=subprocess.STDOUT, check=False)  # fmt: skip
    if not report.is_file():
        raise SystemExit(f"{folder.name}: pytest did not start; see {folder.name}/matrix.log")
    counts: dict[str, Counter[str]] = {area: Counter() for area in AREAS}
    for case in ET.parse(report).iter("testcase"):
        path, name = case.get("classname", "").replace(".", "/") + ".py", case.get("name", "").partition("[")[0]
        area = next((area for area, tests in AREAS.items() if {path, f"{path}::{name}"} & set(tests)), None)
        is_bad = case.find("failure") is not None or case.find("error") is not None
        if area is None:
            raise SystemExit(f"{folder.name}: {path} could not be collected; see {folder.name}/matrix.log")
        counts[area]["failed" if is_bad else "passed"] += 1
    ask = "import transformers, torch; print(transformers.__version__, torch.__version__.partition('+')[0])"
    found = subprocess.check_output([python_of(folder), "-c", ask], text=True, stderr=subprocess.DEVNULL).split()
    outcomes = {
        area: f"pass ({each.total()})"
        if each["passed"] == each.total() > 0
        else f"{each['failed']} of {each.total()} fail"
        for area, each in counts.items()
    }
    return found[0], found[1], outcomes


def cells(line: str) -> list[str]:
    """Give the versions of a row."""
    return [cell.strip() for cell in line.split("|")[1:3]]


def write(transformers: str, torch: str, outcomes: dict[str, str]) -> None:
    """Replace or add a row of the table."""
    row = f"| {transformers} | {torch} | {' | '.join(outcomes.values())} | {datetime.date.today()} |"
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("|---"))
    end = next((place for place in range(head, len(lines)) if not lines[place].startswith("|")), len(lines))
    rows = [line for line in lines[head + 1 : end] if not line.startswith(f"| {transformers} | {torch} |")]
    rows = sorted([*rows, row], key=lambda line: [[int(number) for number in cell.split(".")] for cell in cells(line)])
    TABLE.write_text("\n".join([*lines[: head + 1], *rows, *lines[end:]]) + "\n", encoding="utf-8")


def main() -> int:
    """Run what the command line names, else every release."""
    failed = []
    for name in sys.argv[1:] or RELEASES:
        transformers, _, torch = name.partition("+torch")
        folder = environment(transformers, torch or None)
        found = run(folder)
        write(*found)
        print(name, *(f"{area}: {outcome}" for area, outcome in found[2].items()), sep="\n  ", flush=True)
        failed += [name] if any("fail" in outcome for outcome in found[2].values()) else []
        if torch and name not in failed:
            shutil.rmtree(folder)
    if failed:
        print(f"failed: {', '.join(failed)}; what pytest printed is in .venv-*/matrix.log", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
