"""Keep what chosen modules give for each text: ``lading capture MODEL TEXTS… --sites SITES --out STORE``.

The vectors of several sites stand one behind the other, in the order of the sites.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lading.cli.embed import add_store_arguments, fill_store

if TYPE_CHECKING:
    from lading.embed.batching import Batching
    from lading.embed.embedder import Embedder

_POOLING = {"last": "lasttoken", "first": "cls", "mean": "mean", "max": "max"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "capture",
        help="keep what chosen modules give for each text",
        description="Run a model over texts and keep, for each text, what chosen modules give: one vector a text, that "
        "of several sites one behind the other. Each window of rows is one commit.",
    )
    parser.add_argument("model", help="a model directory with its tokenizer, or a repo id in the hub's cache")
    parser.add_argument(
        "--sites",
        required=True,
        nargs="+",
        help="module names or patterns, behind the texts or before another option: model.layers.{6,12}, "
        "model.layers.3:input; 'lading inspect' lists tensors, and a module's name is what stands before theirs",
    )
    parser.add_argument(
        "--tokens", choices=tuple(_POOLING), default="last", help="which of a text's tokens (default: %(default)s)"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> int:
    def make(batching: Batching, memory: dict[str, str] | None) -> Embedder:
        from lading.api.embedding import site_embedder

        return site_embedder(
            args.model,
            args.sites,
            _POOLING[args.tokens],
            batching=batching,
            max_memory=memory,
            trust_remote_code=args.trust_remote_code,
        )

    return fill_store(args, make)
