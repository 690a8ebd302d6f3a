"""Find a checkpoint's files, on a local path or in the hub's cache, and open its catalog.

Looks for the names that transformers looks for, in its order: ``model.safetensors``, its index,
``pytorch_model.bin``, its index. Imports huggingface_hub only for a repo id, torch never.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lading.checkpoint.catalog import Catalog, Shard
from lading.checkpoint.header import read_header
from lading.checkpoint.index import check_against_index, read_index
from lading.checkpoint.pickled import read_pickled
from lading.errors import CheckpointError, CheckpointNotFoundError, refusal

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_PICKLED = (".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Say where a checkpoint is to be looked for. Immutable."""

    path_or_repo_id: str
    """A file, a directory, or a repo id of the hub."""
    revision: str | None = None
    """Branch, tag or commit of a repo id; None means its main branch."""
    subfolder: str = ""
    variant: str | None = None
    """``"fp16"`` looks for ``model.fp16.safetensors``."""
    cache_dir: str | None = None
    """Another hub cache than the one ``HF_HOME`` names."""
    local_files_only: bool = False
    """Never ask the network for a repo id; ``HF_HUB_OFFLINE=1`` has the same effect."""
    token: str | bool | None = None
    weights_name: str | None = None
    """The one file to begin with, where a configuration names it; None: the usual names are tried."""
    more_names: tuple[str, ...] = ()
    """Shards beside the checkpoint that belong to it wherever they are there."""
    use_safetensors: bool | None = None
    """True or False: only such files, or only pickled ones; None: safetensors first."""

    def candidates(self) -> tuple[str, ...]:
        """List the file names that this checkpoint may begin with, in the order they are tried."""
        if self.weights_name is not None:
            return (self.weights_name,)
        names = candidates(self.variant)
        return names if self.use_safetensors is None else names[:2] if self.use_safetensors else names[2:]


def find_file(source: Source, name: str) -> Path | None:
    """Find one file beside a checkpoint, on disk or in the hub's cache or on the hub; None: it is not there."""
    path = Path(source.path_or_repo_id).expanduser()
    place = path.parent if path.is_file() else path / source.subfolder
    if path.exists():
        return place / name if (place / name).is_file() else None
    if path.is_absolute() or not _REPO_ID.fullmatch(source.path_or_repo_id):
        return None
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return _download(source, name)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def candidates(variant: str | None = None) -> tuple[str, ...]:
    """List the file names a checkpoint may begin with, in the order they are tried."""
    middle = f".{variant}" if variant else ""
    return (
        f"model{middle}.safetensors",
        f"model.safetensors.index{middle}.json",
        f"pytorch_model{middle}.bin",
        f"pytorch_model.bin.index{middle}.json",
    )


def open_catalog(source: Source | str | Path) -> Catalog:
    """Find and describe a checkpoint: read the headers of all its shards, and no data.

    Args:
        source: a path or repo id, or a `Source` with revision, subfolder and the like.

    Raises:
        CheckpointNotFoundError: nothing there, or not in the local cache while offline.
        CheckpointError: see `lading.checkpoint.header`, `.index` and `.pickled`.
    """
    where = source if isinstance(source, Source) else Source(path_or_repo_id=str(source))
    _check_names(where)
    entry, fetch = find_entry(where)
    more = [read_shard(path) for name in where.more_names if (path := find_file(where, name)) is not None]
    if not entry.name.endswith(".json"):
        return Catalog.of([read_shard(entry), *more])
    weight_map = read_index(entry)
    catalog = Catalog.of([*(read_shard(fetch(name)) for name in sorted(set(weight_map.values()))), *more])
    check_against_index(catalog, weight_map, entry)
    return catalog


def _check_names(source: Source) -> None:
    """Refuse a file that a configuration names outside the checkpoint's directory."""
    name = source.weights_name or ""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise CheckpointError(
            refusal(
                f"{source.path_or_repo_id}, config.json",
                found=f"transformers_weights = {name!r}, which leaves the checkpoint's directory",
                expected="a file inside it",
                way_out="do not use a model from this source",
            )
        )


def read_shard(path: Path) -> Shard:
    """Read one shard's table by the reader its name asks for: pickled for .bin, .pt and .pth, else safetensors."""
    return read_pickled(path) if path.suffix in _PICKLED else read_header(path)


def find_entry(source: Source) -> tuple[Path, Callable[[str], Path]]:
    """Find the file a checkpoint begins with, and how its other files are reached by name.

    Raises:
        CheckpointNotFoundError: as for `open_catalog`.
    """
    path = Path(source.path_or_repo_id).expanduser()
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # too long for a name, or not one
        is_file = is_directory = False
    if is_file:
        return path, lambda name: path.parent / name
    if is_directory:
        return _find_in_directory(path / source.subfolder, source)
    if path.is_absolute() or not _REPO_ID.fullmatch(source.path_or_repo_id):
        raise CheckpointNotFoundError(
            refusal(
                source.path_or_repo_id,
                found="neither a file nor a directory",
                expected="a checkpoint file, its directory, or a repo id like 'org/name'",
                way_out="check the path",
            )
        )
    return _find_on_hub(source)


def _find_in_directory(directory: Path, source: Source) -> tuple[Path, Callable[[str], Path]]:
    names = source.candidates()
    for name in names:
        if (directory / name).exists() or (directory / name).is_symlink():
            return directory / name, lambda shard: directory / shard
    raise CheckpointNotFoundError(
        refusal(
            str(directory),
            found=_what_is_there(directory),
            expected=" or ".join(names),
            way_out="name the file itself, or check subfolder and variant",
        )
    )


def _what_is_there(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    if (directory / "adapter_config.json").exists():
        return "an adapter (adapter_config.json) without a model of its own"
    weights = sorted(p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".gguf", *_PICKLED))
    return f"only {', '.join(weights[:5])}" if weights else "no weights"


def _find_on_hub(source: Source) -> tuple[Path, Callable[[str], Path]]:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def shard(name: str) -> Path:
        try:
            return _download(source, name)
        except (EntryNotFoundError, OSError) as error:
            raise _not_on_hub(source, f"shard {name!r} missing: {_first_line(error)}") from error

    reason = ""
    for name in source.candidates():
        try:
            return _download(source, name), shard
        except EntryNotFoundError as error:  # also LocalEntryNotFoundError: not in the cache
            reason = reason or _first_line(error)
        except (RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            raise _not_on_hub(source, _first_line(error)) from error
    raise _not_on_hub(source, reason)


def _download(source: Source, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            source.path_or_repo_id,
            name,
            subfolder=source.subfolder or None,
            revision=source.revision,
            cache_dir=source.cache_dir,
            local_files_only=source.local_files_only,
            token=source.token,
        )
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _not_on_hub(source: Source, reason: str) -> CheckpointNotFoundError:
    where = source.path_or_repo_id + (f" at {source.revision}" if source.revision else "")
    return CheckpointNotFoundError(
        refusal(
            where,
            found=f"no directory of that name and nothing in the hub's cache or on the hub ({reason})",
            expected=" or ".join(source.candidates()),
            way_out="check the name, download the model, or unset HF_HUB_OFFLINE",
        )
    )
