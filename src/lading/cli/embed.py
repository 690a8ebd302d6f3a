"""Embed texts into a vector store: ``lading embed --model DIR --out STORE TEXTS…``.

Knows the arguments, the order of the work and the summary; what a text, a vector or a store is stands in their files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lading.cli.plan import add_trust_argument, parse_memory
from lading.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from lading.embed.batching import Batching
    from lading.embed.corpus import Corpus
    from lading.embed.embedder import Embedder


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "embed",
        help="turn texts into vectors in a Lance dataset",
        description="Turn texts into vectors in a Lance dataset. Each window of rows is one commit: what is committed "
        "stays readable when the run is interrupted.",
    )
    parser.add_argument("--model", required=True, help="model directory or repository")
    parser.add_argument("--prompt-name", help="the model's prompt to put before every text")
    add_store_arguments(parser)
    parser.set_defaults(run=_run, parser=parser)


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that reads texts, runs a model and fills a store."""
    parser.add_argument(
        "texts", nargs="*", metavar="TEXTS", help="UTF-8 text or .jsonl files; none or -: standard input"
    )
    parser.add_argument("--out", required=True, help="the store to make, as corpus.lance")
    parser.add_argument(
        "--split", choices=("line", "paragraph", "file"), default="line", help="what is one text in a text file"
    )
    parser.add_argument("--text-field", help="field with the text (default: text); makes every input JSON lines")
    parser.add_argument("--id-field", help="field with the id (default: file name and line)")
    parser.add_argument(
        "--keep", nargs="+", action="extend", default=[], metavar="FIELD", help="fields to keep beside the text"
    )
    parser.add_argument(
        "--memory",
        help="what weights may take, such as cpu=2GiB; what does not fit streams (default: no limit)",
        metavar="DEVICE=SIZE,…",
    )
    add_trust_argument(parser)
    parser.add_argument("--window-rows", type=int, default=4096, help="texts per commit (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per batch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON")


def _run(args: argparse.Namespace) -> int:
    def make(batching: Batching, memory: dict[str, str] | None) -> Embedder:
        from lading.api.embedding import Embedder as Maker

        return Maker(args.model, batching=batching, max_memory=memory, trust_remote_code=args.trust_remote_code)

    return fill_store(args, make, prompt_name=args.prompt_name)


def fill_store(
    args: argparse.Namespace,
    make: Callable[[Batching, dict[str, str] | None], Embedder],
    *,
    prompt_name: str | None = None,
) -> int:
    """Embed the texts of a command line into its store and print what was done."""
    corpus = _read_corpus(args)

    from tqdm import tqdm

    from lading.embed.batching import Batching
    from lading.embed.store import VectorStore
    from lading.errors import EmbedError, StoreError, refusal
    from lading.residency.residency import Residency

    store = VectorStore(args.out)
    if store.exists():
        found = f"{len(store)} rows already there" if (store.path / "_versions").exists() else "something already there"
        raise StoreError(
            refusal(args.out, found=found, expected="a new path", way_out="choose another --out, or remove this one")
        )
    batching = Batching(window_rows=args.window_rows, max_batch_tokens=args.batch_tokens)
    memory = None if args.memory is None else parse_memory(args.memory)
    start_s = time.perf_counter()
    embedder = make(batching, memory)
    loaded_s = time.perf_counter()
    rows = embedder.stream(corpus.records(), prompt_name=prompt_name)
    try:
        with tqdm(rows, desc="embedding", unit=" texts", file=sys.stderr, disable=None) as bar:
            num_texts = store.extend(bar, window_rows=args.window_rows)
    except BaseException:
        if len(store):
            print(f"{len(store)} texts were committed to {args.out} before this and stay readable", file=sys.stderr)
        raise
    elapsed_s = time.perf_counter() - loaded_s
    if num_texts == 0:
        raise EmbedError(
            refusal(", ".join(corpus.paths), found="no text", expected="one or more", way_out="check the input")
        )
    num_tokens = embedder.stats().num_tokens
    residency = Residency.of(embedder.module)
    streamed = {} if residency is None else {"residency": asdict(residency.stats())}
    _print_summary(
        {
            "out": args.out,
            "texts": num_texts,
            "dimension": store.dimension,
            "tokens": num_tokens,
            "tokens_per_s": num_tokens / elapsed_s,
            "embed_s": elapsed_s,
            "load_s": loaded_s - start_s,
            "peak_memory_bytes": _peak_memory_bytes(),
            **streamed,
        },
        as_json=args.json,
    )
    if residency is not None and not args.json:
        print(f"weights in {args.memory}: {residency.stats()}")
    return 0


def _read_corpus(args: argparse.Namespace) -> Corpus:
    """Check the texts before anything heavy is imported."""
    from lading.embed.corpus import STDIN, Corpus

    swallowed = [name for name in args.keep if Path(name).is_file()]
    if not args.texts and swallowed:
        args.parser.error(f"--keep took {swallowed[0]!r}, which is a file: name the texts before --keep")
    if not args.texts and sys.stdin.isatty():
        args.parser.error("no texts: name files, or send texts to standard input")
    return Corpus(
        paths=tuple(args.texts) or (STDIN,),
        split=args.split,
        text_field=args.text_field,
        id_field=args.id_field,
        kept_fields=tuple(args.keep),
    )


def _print_summary(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    print(
        f"{summary['texts']:,} texts, {summary['tokens']:,} tokens → {summary['out']} "
        f"({summary['dimension']} dimensions)\n"
        f"embedded in {summary['embed_s']:.1f} s, {summary['tokens_per_s']:,.0f} tokens/s · "
        f"model loaded in {summary['load_s']:.2f} s, imports included · "
        f"peak memory {format_bytes(int(summary['peak_memory_bytes']))}"
    )


def _peak_memory_bytes() -> int:
    """Read the most memory this process ever held, mapped files included (Linux: VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("unreachable: every Linux reports VmHWM")
