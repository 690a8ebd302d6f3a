"""Make checkpoints by hand, byte by byte, so that they can be broken in chosen places; knows nothing of lading."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
SRC = Path(__file__).parents[2] / "src"


def encode(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Give a safetensors file's bytes from a header (an object or its raw bytes), whose length may be lied about."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def bits(tensor: torch.Tensor) -> bytes:
    """Return the tensor's elements as bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def attempt(
    function: Callable[..., _Result], *arguments: Any, refusing: type[Exception]
) -> tuple[_Result, None] | tuple[None, str]:
    """Call a reader that may give a result or refuse, and give (result, None) or (None, message); other errors pass."""
    try:
        return function(*arguments), None
    except refusing as error:
        return None, str(error)


def open_files() -> list[str]:
    """List what this process holds open, after everything unreachable is gone."""
    gc.collect()
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]  # the listing's own is gone by now
    return sorted(str(link.readlink()) for link in links)


def run_python(code: str, *arguments: object, memory_bytes: int | None = None, cpu_s: int | None = None) -> str:
    """Run code in a fresh interpreter that can import lading, under hard limits, and give what it printed.

    ``memory_bytes`` limits the address space: exceeding it is a MemoryError there. ``cpu_s`` kills what does not end.
    """

    def limit() -> None:
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        if cpu_s is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))

    path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout
