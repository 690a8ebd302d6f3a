"""``lading generate``: continue a text with a model that may be larger than the memory it is given."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lading.cli.plan import add_trust_argument, parse_memory
from lading.errors import LadingError, PlanError, refusal
from lading.units import format_bytes

if TYPE_CHECKING:
    from lading.adapters.generation import Continuation
    from lading.residency.stats import ResidencyStats


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="continue a text with a model that does not fit",
        description="Continue texts greedily with a causal language model that is planned into the memory given, and "
        "say what was fetched. Exit code 2 when there is no room.",
    )
    parser.add_argument("model", help="a model directory with its tokenizer, or a repo id in the hub's cache")
    parser.add_argument("--prompt", action="append", default=[], help="a text to continue; may be given again")
    parser.add_argument("--prompts", metavar="FILE", help="a UTF-8 file with a prompt a line; -: standard input")
    parser.add_argument(
        "--memory",
        help="what weights may take, such as cpu=2GiB (default: what is free now)",
        metavar="DEVICE=SIZE,…",
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to add at most (default: %(default)s)")
    dtypes = ["auto", "float64", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="what weights are loaded in (auto: as stored)")
    parser.add_argument("--revision", help="branch, tag or commit, for a repo id")
    parser.add_argument("--subfolder", default="", help="folder inside the directory or repo")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run, parser=parser)


def _run(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    if arguments.new_tokens < 1:
        arguments.parser.error(f"--new-tokens: found {arguments.new_tokens}, expected 1 or more")

    from lading.adapters.generation import Continuer
    from lading.api.convoying import convoy
    from lading.api.loading import load
    from lading.placement.plan import PlanWarning
    from lading.residency.residency import Residency

    place = {"revision": arguments.revision, "subfolder": arguments.subfolder}
    code = {"trust_remote_code": arguments.trust_remote_code}
    try:
        memory = None if arguments.memory is None else parse_memory(arguments.memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)  # `lading plan` is there to tell them
            model = load(arguments.model, device_map="auto", max_memory=memory, dtype=arguments.dtype, **place, **code)
    except PlanError as error:
        print(f"lading generate: {error}", file=sys.stderr)
        return 2
    residency = Residency.of(model)
    assert residency is not None, "what is planned is offloaded"
    continuer = Continuer(model, arguments.model, **{key: value for key, value in place.items() if value}, **code)
    begin_s = time.perf_counter()
    found = []
    with convoy(model, prompts, function=partial(continuer, new_tokens=arguments.new_tokens), seed=0) as continuations:
        for prompt, each in zip(prompts, continuations, strict=True):
            found.append(each)
            if not arguments.json:
                print(f"{prompt}{each.text}", flush=True)
    elapsed_s = time.perf_counter() - begin_s
    if arguments.json:
        print(json.dumps(_summary(found, residency.stats(), elapsed_s), ensure_ascii=False))
    else:
        _print_stats(found, residency, elapsed_s)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Collect what is to be continued before anything heavy is imported.

    Raises:
        LadingError: the file cannot be read.
    """
    prompts: list[str] = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            text = sys.stdin.read() if arguments.prompts == "-" else Path(arguments.prompts).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            expected = "a UTF-8 text file with a prompt a line"
            raise LadingError(
                refusal(f"--prompts {arguments.prompts}", found=str(error), expected=expected, way_out="correct it")
            ) from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        arguments.parser.error("no prompt: give --prompt TEXT or --prompts FILE with a line that is not empty")
    return prompts


def _summary(found: list[Continuation], stats: ResidencyStats, elapsed_s: float) -> dict[str, Any]:
    return {"texts": [asdict(each) for each in found], "generate_s": elapsed_s, "stats": asdict(stats)}


def _print_stats(found: list[Continuation], residency: Any, elapsed_s: float) -> None:
    plan = residency.plan
    num_tokens = sum(each.num_tokens for each in found)
    print(
        f"\n{num_tokens:,} tokens in {elapsed_s:.2f} s, {num_tokens / elapsed_s:,.1f} tokens/s · of "
        f"{format_bytes(plan.total_bytes)} of weights {format_bytes(plan.resident_bytes)} stay in memory\n"
        f"{residency.stats()}"
    )
