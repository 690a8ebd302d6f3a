"""``lading inspect``: list what a checkpoint holds, from its headers alone, without importing torch.

What can be read is listed, whatever else is wrong; then what is wrong is said. *Faults* are what `lading.load` refuses,
and the exit code is 1; *notes* are what it warns of and gets along with, such as an index that names other tensors than
its shards hold. Names are shown printable: what a terminal would obey in them stands there as an escape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lading.errors import CheckpointError, printable
from lading.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="list a checkpoint's tensors, dtypes, bytes, shards and ties",
        description="List a checkpoint's tensors, dtypes, bytes, shards and ties, from its headers alone.",
    )
    parser.add_argument(
        "path", help="a file of safetensors or torch.save, a model directory, or a repo id in the hub's cache"
    )
    parser.add_argument("--revision", help="branch, tag or commit, for a repo id")
    parser.add_argument("--subfolder", default="", help="folder inside the directory or repo")
    parser.add_argument("--variant", help="such as fp16, for model.fp16.safetensors")
    parser.add_argument(
        "--inner-key", help="key of the dict of tensors inside a training checkpoint, such as state_dict"
    )
    parser.add_argument("--verify", action="store_true", help="read every byte once: checksums, damage, equal tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from lading.checkpoint.locate import Source, survey_checkpoint

    source = Source(
        path_or_repo_id=arguments.path,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
        inner_key=arguments.inner_key,
    )
    survey = survey_checkpoint(source)
    faults = [str(fault) for fault in survey.faults]
    verification = None
    if arguments.verify and survey.catalog.shards:
        try:
            verification = _verify(survey.catalog)
        except CheckpointError as error:
            faults.append(str(error))
    facts = _facts(survey.catalog, verification) if survey.catalog.shards else _nothing(arguments.path)
    facts["notes"], facts["faults"] = list(survey.catalog.notes), faults
    if arguments.json:
        print(json.dumps(facts).replace("\x7f", "\\u007f"))  # the one control character that JSON leaves as it is
    elif survey.catalog.shards:
        print(_table(facts))
    for said in (*facts["notes"], *faults):
        print(f"lading inspect: {said}", file=sys.stderr)
    return 1 if faults else 0


def _nothing(path: str) -> dict[str, Any]:
    """Give the facts about a checkpoint of which nothing could be read."""
    none: dict[str, Any] = {"num_tensors": 0, "num_bytes": 0, "dtypes": {}, "shards": [], "ties": [], "tensors": []}
    return {"directory": path, **none, "tie_word_embeddings": None}


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
            "shard": catalog.name_of(shard),
            "offset": spec.offset,
        }
        for shard in catalog.shards
        for spec in shard.tensors.values()
    ]
    dtype_bytes: Counter[str] = Counter()
    for tensor in tensors:
        dtype_bytes[tensor["dtype"]] += tensor["num_bytes"]
    facts: dict[str, Any] = {
        "directory": str(catalog.directory),
        "num_tensors": len(tensors),
        "num_bytes": catalog.num_bytes,
        "dtypes": dict(dtype_bytes.most_common()),
        "shards": [
            {
                "name": catalog.name_of(shard),
                "file_bytes": shard.identity.num_bytes,
                "num_tensors": len(shard.tensors),
                "metadata": dict(shard.metadata),
            }
            for shard in catalog.shards
        ],
        "ties": _ties(catalog),
        "tie_word_embeddings": _ties_embeddings(catalog.directory / "config.json"),
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
                groups.setdefault((shard.path, spec.offset, spec.num_bytes, spec.is_conj, spec.is_neg), []).append(
                    spec.name
                )
    for alias, name in catalog.aliases.items():
        shard, spec = catalog.owners[name], catalog[name]
        groups.setdefault((shard.path, spec.offset, spec.num_bytes, spec.is_conj, spec.is_neg), []).append(alias)
    return [names for names in groups.values() if len(names) > 1]


def _ties_embeddings(config: Path) -> bool | None:
    """Read ``tie_word_embeddings`` beside the checkpoint; None where the configuration does not say."""
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, bool) else None


def _table(facts: dict[str, Any]) -> str:
    shards, tensors = facts["shards"], facts["tensors"]
    lines = [
        f"{facts['directory']}: {facts['num_tensors']} tensors, {format_bytes(facts['num_bytes'])} "
        f"in {len(shards)} shard{'s' if len(shards) > 1 else ''}"
    ]
    lines += [
        f"  {shard['name']}  {shard['num_tensors']} tensors, file of {format_bytes(shard['file_bytes'])}"
        for shard in shards
    ]
    lines.append("dtypes: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in facts["dtypes"].items()))
    lines.append("ties: " + ("; ".join(" = ".join(group) for group in facts["ties"]) or "none on the same bytes"))
    if facts["tie_word_embeddings"] is not None:
        lines.append(f"tie_word_embeddings in config.json: {str(facts['tie_word_embeddings']).lower()}")
    if "verified" in facts:
        lines.append(f"verified: {format_bytes(facts['verified']['num_bytes'])} read, nothing damaged")
        lines += [f"  sha256 {digest}  {name}" for name, digest in facts["verified"]["sha256"].items()]
        lines += [f"  equal bytes: {' = '.join(group)}" for group in facts["verified"]["equal"]]
    lines.append("")
    names = [printable(tensor["name"]) for tensor in tensors]
    width = max(map(len, names), default=0)
    for name, tensor in zip(names, tensors, strict=True):
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        lines.append(f"{name:<{width}}  {tensor['dtype']:<4}  {format_bytes(tensor['num_bytes']):>9}  {shape}")
    return "\n".join(map(printable, lines))
