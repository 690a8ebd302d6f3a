"""Run contenders in processes of their own and talk to them.

Knows the conversation that `measured` describes, and nothing of what is loaded. A `Runner` starts a fresh process for
each job; with ``forked`` it keeps one process per interpreter and seat, which forks for each job. Leaving the runner's
context ends every process it started. One thread; the sampler of `measure` is the only other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import measure
from contenders import Job, Skip

_SCRIPT = Path(__file__).with_name("measured.py")
_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": sys.version.split()[0]}
for name in ("torch", "transformers", "accelerate", "safetensors"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class ContenderError(RuntimeError):
    """Say how a contender failed, with its own traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """Name a Python and what is installed in it. Immutable."""

    path: str
    versions: dict[str, str] = field(hash=False)

    @classmethod
    def at(cls, path: str) -> Interpreter:
        """Ask an interpreter for its versions."""
        asked = subprocess.run([path, "-c", _VERSIONS], capture_output=True, text=True, check=True)
        return cls(path=path, versions=json.loads(asked.stdout))

    @property
    def transformers_major(self) -> int:
        """Give the first number of transformers' version."""
        return int(self.versions["transformers"].split(".", 1)[0])


class Runner:
    """Start contenders' processes.

    Args:
        package: lading's own folder. A copy of it is measured in every interpreter, alone and safe from edits.
        threads: for torch; also the number of cores a measured process may use.
        forked: fork each job from a kept process instead of starting a fresh one.
    """

    def __init__(self, package: Path, threads: int, *, forked: bool) -> None:
        self._beside = tempfile.TemporaryDirectory()
        copied = Path(self._beside.name, package.name)
        shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
        self._threads = threads
        self.forked = forked
        self._kept: dict[tuple[str, int], _Talk] = {}
        self._open: set[_Talk] = set()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for talk in self._open:
            talk.kill()
        self._open.clear()
        self._beside.cleanup()

    def start(self, interpreter: Interpreter, job: Job, seat: int = 0) -> Running:
        """Begin the imports for a job and come back at once; ``seat`` tells apart jobs that live together."""
        job.threads, job.forked = self._threads, self.forked
        if not self.forked:
            talk = self._talk_to(interpreter)
        elif (interpreter.path, seat) in self._kept:
            talk = self._kept[interpreter.path, seat]
        else:
            talk = self._kept[interpreter.path, seat] = self._talk_to(interpreter)
        return Running(self, talk, job)

    def _talk_to(self, interpreter: Interpreter) -> _Talk:
        paths = [self._beside.name, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self._threads),
            "MALLOC_MMAP_THRESHOLD_": "65536",  # freed blocks leave the resident set, which is what is read
        }
        talk = _Talk([interpreter.path, str(_SCRIPT)], environment)
        self._open.add(talk)
        return talk

    def release(self, talk: _Talk) -> None:
        """End a fresh process; a kept one stays for the next job."""
        if not self.forked:
            talk.end()
            self._open.discard(talk)


class Running:
    """Hold one contender's process, from its imports to its end."""

    def __init__(self, runner: Runner, talk: _Talk, job: Job) -> None:
        self._runner = runner
        self._talk = talk
        self._job = job
        self.pid = 0
        self._first: dict[str, Any] | None = None
        talk.say(json.dumps(asdict(job)))

    def wait_imported(self) -> None:
        """Wait until everything is imported, or cannot be."""
        if self._first is None:
            self._first = self._talk.hear()

    def wait_ready(self) -> None:
        """Wait until everything is imported.

        Raises:
            Skip: this way to load does not exist in that interpreter.
            ContenderError: its imports failed.
        """
        self.wait_imported()
        assert self._first is not None
        self.pid = self._checked(self._first)["pid"]

    def measure(self) -> dict[str, Any]:
        """Let it load and run, and watch its memory meanwhile; gives the measurement."""
        others = sorted(os.sched_getaffinity(0))[self._job.threads :]  # than those `measured` pins itself to
        with measure.PeakSampler(self.pid, others) as sampler:
            self._talk.say("go")
            told = self._checked(self._talk.hear())
        for phase, end_s in (("load", told["loaded_s"]), ("run", told["end_s"])):
            at_end = "loaded" if phase == "load" else "run"
            sampled = sampler.peaks(told["begin_s"], end_s)
            for kind, peak in zip(("anonymous", "file"), sampled, strict=True):
                seen = peak - told[f"before_{kind}_bytes"]
                told[f"{phase}_peak_{kind}_bytes"] = max(seen, told[f"{at_end}_{kind}_bytes"])
        return told

    def end(self) -> None:
        """Let go of it, and of the model if it holds one."""
        if self._job.hold and self.pid:
            self._talk.say("end")
            self._talk.hear()
        self._runner.release(self._talk)

    def _checked(self, told: dict[str, Any]) -> dict[str, Any]:
        if "skip" in told:
            self.pid = 0
            raise Skip(told["skip"])
        if "error" in told:
            self.pid = 0
            raise ContenderError(f"{self._job.contender} on {self._job.model_class}: {told['traceback']}")
        return told


@contextmanager
def holding(running: list[Running]) -> Iterator[list[Running]]:
    """End some processes when the context is left."""
    try:
        yield running
    finally:
        for one in running:
            one.end()


class _Talk:
    """Exchange lines of JSON with a process."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end` and `kill`
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            sys.stderr.write(self._last_words())

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"ended with status {self._process.wait()}: {self._last_words()}")
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def _close(self) -> None:
        for stream in (self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
