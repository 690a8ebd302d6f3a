"""Find the nearest texts of a vector store: ``lading search corpus.lance "query"``.

Knows the arguments and how hits are printed; the model that embeds the query is the one that the store names.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lading.cli.plan import add_trust_argument

if TYPE_CHECKING:
    from lading.embed.rows import Hit, VectorSource

_SHOWN_CHARACTERS = 320


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "search", help="find the nearest texts of a store", description="Find the texts of a store nearest to a query."
    )
    parser.add_argument("store", help="a store that 'lading embed' made")
    parser.add_argument("query", help="any text")
    parser.add_argument("--k", type=int, default=5, help="how many texts (default: %(default)s)")
    parser.add_argument("--model", help="model directory or repository (default: the one the store names)")
    parser.add_argument("--prompt-name", help="the model's prompt for the query (default: 'query' where it has one)")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the hits as one line of JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lading.api.embedding import Embedder
    from lading.embed.store import VectorStore

    store = VectorStore(args.store)
    source = store.source
    if source.sites:
        _refuse_captured(args.store, source)
    model = args.model or _recorded_model(args.store, source)
    embedder = Embedder(model, trust_remote_code=args.trust_remote_code)
    prompts = embedder.settings.prompts
    prompt_name = "query" if args.prompt_name is None and "query" in prompts else args.prompt_name
    query = embedder.encode(args.query, prompt_name=prompt_name)
    _check_model(args, source, embedder.source(query.dtype))
    _print_hits(cast("list[Hit]", store.search(query, k=args.k)), as_json=args.json)
    return 0


def _refuse_captured(store: str, source: VectorSource) -> None:
    from lading.errors import StoreError, refusal

    raise StoreError(
        refusal(
            store,
            found=f"vectors of {source.sites}, captured inside {source.model}",
            expected="vectors that `lading embed` made: a query is embedded as they were",
            way_out="search it with a vector of your own: lading.VectorStore(...).search(vector)",
        )
    )


def _recorded_model(store: str, source: VectorSource) -> str:
    from lading.errors import StoreError, refusal

    if not source.model or (Path(source.model).is_absolute() and not Path(source.model).exists()):
        found = f"the model {source.model!r}, which is no longer there" if source.model else "no recorded model"
        raise StoreError(
            refusal(store, found=found, expected="the model that made the vectors", way_out="name it: --model")
        )
    return source.model


def _check_model(args: argparse.Namespace, source: VectorSource, found: VectorSource) -> None:
    """Refuse a model whose vectors are made in another way than the store's; its path and dtype may differ."""
    from dataclasses import replace

    from lading.errors import StoreError, refusal

    differences = replace(found, model=source.model, dtype=source.dtype, prompt=source.prompt).differences(source)
    if differences:
        raise StoreError(
            refusal(
                args.store,
                found=f"a model with {'; '.join(differences)}",
                expected="the way in which the store's vectors were made",
                way_out="name the model that made them: --model",
            )
        )


def _print_hits(hits: list[Hit], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False))
        return
    for rank, hit in enumerate(hits, 1):
        fields = "".join(f" · {name}: {value}" for name, value in hit.fields.items())
        print(f"{rank}. {hit.id} · {hit.score:.4f}{fields}")
        print(
            textwrap.indent(textwrap.fill(textwrap.shorten(hit.text, _SHOWN_CHARACTERS, placeholder=" …"), 100), "   ")
        )
