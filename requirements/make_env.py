"""Make the project's environments, each whole or not at all; called by the Makefile, needs Python and pip only.

    python3 requirements/make_env.py demo   # .venv-t5 with what the demo needs
    python3 requirements/make_env.py t5     # the same environment with every test tool
    python3 requirements/make_env.py t4     # .venv-t4: transformers 4 and flair
    python3 requirements/make_env.py peers  # .venv-peers: what only benchmarks compare with

An environment is made in stages. A finished stage leaves a stamp that holds the fingerprint of everything it was made
from: this script, the requirement files, the dependencies in pyproject.toml, the interpreter and the folder. Where the
stamp agrees nothing is done (a tenth of a second). Where it does not, or where a stage was interrupted, the environment
is deleted and made again: half of one is never taken for whole. Two runs at once wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = Path("requirements")
LADING = ["-e", ".[store]"]

# Environment → its folder, its constraints, and its stages: what each passes to pip, one list a call.
ENVIRONMENTS: dict[str, tuple[str, str, dict[str, list[list[str]]]]] = {
    "t5": (
        ".venv-t5",
        "constraints-t5.txt",
        {
            "demo": [LADING, ["--no-deps", "-r", "demo.txt"]],
            "t5": [["-r", "t5.txt"], ["--no-build-isolation", "-r", "t5-from-source.txt"]],
        },
    ),
    "t4": (".venv-t4", "constraints-t4.txt", {"t4": [[*LADING, "-r", "t4.txt"]]}),
    "peers": (".venv-peers", "constraints-peers.txt", {"peers": [["-r", "peers.txt"]]}),
}


def fingerprint(constraints: str, stages: dict[str, list[list[str]]], stage: str) -> str:
    """Hash everything that a stage and those before it are made from."""
    names = list(stages)
    calls = [call for name in names[: names.index(stage) + 1] for call in stages[name]]
    digest = hashlib.sha256(f"{sys.version} {sys.executable} {ROOT} {calls}".encode())
    files = [constraints, *(argument for call in calls for argument in call if argument.endswith(".txt"))]
    for path in [Path(__file__), *(ROOT / FILES / name for name in files)]:
        digest.update(path.read_bytes())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    digest.update(project.split("\n[tool.", 1)[0].encode())  # linters' settings change no environment
    return digest.hexdigest()


def install(python: Path, constraints: str, call: list[str]) -> None:
    """Run one pip call inside the environment, pinned by its constraints."""
    arguments = [str(FILES / argument) if argument.endswith(".txt") else argument for argument in call]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # DS_BUILD_OPS=0: deepspeed without compiled ops, so that no CUDA toolkit is asked for.
    subprocess.run(
        [*command, "-c", str(FILES / constraints), *arguments],
        check=True,
        cwd=ROOT,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )


def make(environment: str, last_stage: str) -> None:
    """Bring one environment up to a stage; do nothing where it is there already."""
    folder_name, constraints, stages = ENVIRONMENTS[environment]
    folder, unfinished = ROOT / folder_name, ROOT / folder_name / ".unfinished"
    names = list(stages)
    wanted = names[: names.index(last_stage) + 1]
    stamps = {stage: folder / f".made-{stage}" for stage in wanted}
    prints = {stage: fingerprint(constraints, stages, stage) for stage in wanted}
    made = [stage for stage in wanted if stamps[stage].is_file() and stamps[stage].read_text() == prints[stage]]
    is_outdated = any(stamps[stage].exists() and stage not in made for stage in wanted)
    if unfinished.exists() or is_outdated or not made:
        shutil.rmtree(folder, ignore_errors=True)
        made = []
    for stage in (stage for stage in wanted if stage not in made):
        began = time.monotonic()
        print(f"{folder_name}: making stage {stage} (minutes on a new machine, nothing later)", flush=True)
        folder.mkdir(exist_ok=True)
        unfinished.touch()
        if stage == names[0]:
            venv.create(folder, with_pip=True)
        for call in stages[stage]:
            install(folder / "bin" / "python", constraints, call)
        stamps[stage].write_text(prints[stage])
        unfinished.unlink()
        print(f"{folder_name}: stage {stage} made in {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    """Make the environment named on the command line."""
    if sys.version_info < (3, 10):  # noqa: UP036  # whoever calls this may have any Python
        print(f"lading needs Python 3.10 or newer, found {sys.version.split()[0]}: make PYTHON=… names another")
        return 2
    stage = sys.argv[1] if len(sys.argv) == 2 else ""
    environment = next((name for name, (_, _, stages) in ENVIRONMENTS.items() if stage in stages), None)
    if environment is None:
        print(__doc__)
        return 2
    lock = ROOT / ".cache" / f"{environment}.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            make(environment, stage)
        except subprocess.CalledProcessError as error:
            print(f"pip failed with exit code {error.returncode}; what it printed stands above", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
