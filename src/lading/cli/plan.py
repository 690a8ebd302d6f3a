"""``lading plan``: say where each block of a model would rest, and why, without reading a weight."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import Any

from lading.errors import PlanError, refusal
from lading.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="place a model over GPUs, RAM and disk, and prove the placement",
        description="Place a model over GPUs, RAM and disk, and prove the placement; nothing is loaded. "
        "Exit code 2 when there is no room.",
    )
    parser.add_argument("model", help="a model directory, or a repo id in the hub's cache; config.json is enough")
    parser.add_argument(
        "--memory",
        help="what may be used, such as 0=10GiB,1=24GiB,cpu=64GiB,disk=1TB (default: what is free now)",
        metavar="DEVICE=SIZE,…",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows of a batch to keep room for (default: 1)")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of input in a row to keep room for")
    parser.add_argument("--new-tokens", type=int, default=0, help="tokens to generate after them")
    parser.add_argument("--kv-dtype", help="element type of the KV cache (default: the model's)")
    dtypes = ["auto", "float64", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="what weights are loaded in (auto: as stored)")
    strategies = ["contiguous", "any", "sequential", "balanced"]
    parser.add_argument("--strategy", default="contiguous", choices=strategies, help="how blocks may be distributed")
    runtimes = ["lading", "accelerate"]
    parser.add_argument("--runtime", default="lading", choices=runtimes, help="whose room for streaming is kept")
    orders = ["registration", "trace"]
    parser.add_argument("--order", default="registration", choices=orders, help="trace: as a traced forward calls them")
    parser.add_argument("--probe", action="store_true", help="measure the machine's rates and predict a forward's time")
    parser.add_argument("--revision", help="branch, tag or commit, for a repo id")
    parser.add_argument("--subfolder", default="", help="folder inside the directory or repo")
    add_trust_argument(parser)
    parser.add_argument("--minimum", action="store_true", help="print the least memory that works, to the byte")
    parser.add_argument("--plot", metavar="FILE", help="also draw it, to an .svg or .png file (lading[plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add the one way to let a model folder's own code run."""
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code from the repository to run")


def _run(arguments: argparse.Namespace) -> int:
    from lading.api.planning import plan
    from lading.placement.plan import PlanWarning
    from lading.placement.workload import Workload

    has_workload = arguments.tokens or arguments.new_tokens or arguments.batch != 1 or arguments.kv_dtype
    try:
        workload = Workload(
            batch_size=arguments.batch,
            num_tokens=arguments.tokens,
            new_tokens=arguments.new_tokens,
            kv_dtype=arguments.kv_dtype,
        )
        memory = None if arguments.memory is None else parse_memory(arguments.memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)  # they are part of what is printed
            made = plan(
                arguments.model,
                {"cpu": 2**62} if arguments.minimum else memory,
                dtype=arguments.dtype,
                workload=workload if has_workload else None,
                strategy=arguments.strategy,
                runtime=arguments.runtime,
                order=arguments.order,
                bandwidths="probe" if arguments.probe else None,
                revision=arguments.revision,
                subfolder=arguments.subfolder,
                trust_remote_code=arguments.trust_remote_code,
            )
    except PlanError as error:
        print(f"lading plan: {error}", file=sys.stderr)
        return 2
    if arguments.plot:
        made.plot(arguments.plot)
    if arguments.minimum:
        least = made.explain()["minimum"]
        print(json.dumps(least) if arguments.json else _minimum(least))
    else:
        print(made.to_json() if arguments.json else made)
    return 0


def parse_memory(text: str) -> dict[str, str]:
    """Read ``0=10GiB,cpu=64GiB``.

    Raises:
        PlanError: a part is not DEVICE=SIZE, or names a device again.
    """
    memory: dict[str, str] = {}
    for part in text.split(","):
        device, equals, size = part.partition("=")
        if not equals or device.strip() in memory:
            expected = "each device once, DEVICE=SIZE,DEVICE=SIZE, such as 0=10GiB,cpu=64GiB"
            raise PlanError(refusal("--memory", found=repr(text), expected=expected, way_out="correct it"))
        memory[device.strip()] = size
    return memory


def _minimum(least: dict[str, Any]) -> str:
    lines = [
        f"{size:>20,} bytes ({format_bytes(size)}) on each of {count} equal device{'s' if int(count) > 1 else ''}: "
        "all blocks resident"
        for count, size in least["all_resident"].items()
    ]
    size = least["useful"]
    lines.append(f"{size:>20,} bytes ({format_bytes(size)}) on one device: it keeps a block, the others are streamed")
    return "\n".join(lines)
