"""``lading inspect``: list what a checkpoint holds, from its headers alone, without importing torch."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from lading.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="list a checkpoint's tensors, dtypes, bytes, shards and ties",
        description="List a checkpoint's tensors, dtypes, bytes, shards and ties, from its headers alone.",
    )
    parser.add_argument("path", help="a .safetensors or .bin file, a model directory, or a repo id in the hub's cache")
    parser.add_argument("--revision", help="branch, tag or commit, for a repo id")
    parser.add_argument("--subfolder", default="", help="folder inside the directory or repo")
    parser.add_argument("--variant", help="such as fp16, for model.fp16.safetensors")
    parser.add_argument("--verify", action="store_true", help="read every byte once: checksums, damage, equal tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from lading.checkpoint.locate import Source, open_catalog

    source = Source(
        path_or_repo_id=arguments.path,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
    )
    catalog = open_catalog(source)
    verification = _verify(catalog) if arguments.verify else None
    facts = _facts(catalog, verification)
    print(json.dumps(facts) if arguments.json else _table(facts))
    return 0


def _verify(catalog: Any) -> Any:
    from tqdm import tqdm

    from lading.checkpoint.verify import verify

    total = sum(shard.identity.num_bytes for shard in catalog.shards)
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, delay=1, disable=None, leave=False) as bar:
        return verify(catalog, bar.update)


def _facts(catalog: Any, verification: Any) -> dict[str, Any]:
    """Collect what is shown, as plain data."""
    tensors = [
        {
            "name": spec.name,
            "dtype": spec.element.name,
            "shape": list(spec.shape),
            "num_bytes": spec.num_bytes,
            "shard": shard.path.name,
            "offset": spec.offset,
        }
        for shard in catalog.shards
        for spec in shard.tensors.values()
    ]
    dtype_bytes: Counter[str] = Counter()
    for tensor in tensors:
        dtype_bytes[tensor["dtype"]] += tensor["num_bytes"]
    facts: dict[str, Any] = {
        "directory": str(catalog.shards[0].path.parent),
        "num_tensors": len(tensors),
        "num_bytes": catalog.num_bytes,
        "dtypes": dict(dtype_bytes.most_common()),
        "shards": [
            {
                "name": shard.path.name,
                "file_bytes": shard.identity.num_bytes,
                "num_tensors": len(shard.tensors),
                "metadata": dict(shard.metadata),
            }
            for shard in catalog.shards
        ],
        "ties": _ties(catalog),
        "tie_word_embeddings": _ties_embeddings(catalog.shards[0].path.parent / "config.json"),
        "tensors": tensors,
    }
    if verification is not None:
        facts["verified"] = {
            "num_bytes": verification.num_bytes,
            "sha256": verification.sha256,
            "equal": [list(group) for group in verification.equal],
        }
    return facts


def _ties(catalog: Any) -> list[list[str]]:
    """List names that stand on the same bytes: aliases recorded by the saver, or shared ranges of a pickled file."""
    groups: dict[Any, list[str]] = {}
    for shard in catalog.shards:
        for spec in shard.tensors.values():
            if spec.num_bytes:
                groups.setdefault((shard.path, spec.offset, spec.num_bytes), []).append(spec.name)
        for alias, name in shard.aliases.items():
            spec = shard.tensors[name]
            groups.setdefault((shard.path, spec.offset, spec.num_bytes), []).append(alias)
    return [names for names in groups.values() if len(names) > 1]


def _ties_embeddings(config: Path) -> bool | None:
    """Read ``tie_word_embeddings`` beside the checkpoint; None where the configuration does not say."""
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, bool) else None


def _table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['directory']}: {facts['num_tensors']} tensors, {format_bytes(facts['num_bytes'])} "
        f"in {len(facts['shards'])} shard{'s' if len(facts['shards']) > 1 else ''}"
    ]
    lines += [
        f"  {shard['name']}  {shard['num_tensors']} tensors, file of {format_bytes(shard['file_bytes'])}"
        for shard in facts["shards"]
    ]
    lines.append("dtypes: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in facts["dtypes"].items()))
    lines.append("ties: " + ("; ".join(" = ".join(group) for group in facts["ties"]) or "none on the same bytes"))
    if facts["tie_word_embeddings"] is not None:
        lines.append(f"tie_word_embeddings in config.json: {str(facts['tie_word_embeddings']).lower()}")
    if "verified" in facts:
        lines.append(f"verified: {format_bytes(facts['verified']['num_bytes'])} read, nothing damaged")
        lines += [f"  sha256 {digest}  {name}" for name, digest in facts["verified"]["sha256"].items()]
        lines += [f"  equal bytes: {' = '.join(group)}" for group in facts["verified"]["equal"]]
    width = max((len(tensor["name"]) for tensor in facts["tensors"]), default=0)
    lines.append("")
    for tensor in facts["tensors"]:
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        lines.append(
            f"{tensor['name']:<{width}}  {tensor['dtype']:<4}  {format_bytes(tensor['num_bytes']):>9}  {shape}"
        )
    return "\n".join(lines)
