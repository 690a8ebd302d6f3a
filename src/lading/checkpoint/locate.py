"""Find a checkpoint's files, on a local path or in the hub's cache, and open its catalog.

Looks for the names that transformers looks for, in its order: ``model.safetensors``, its index,
``pytorch_model.bin``, its index. What a file is, its first bytes say. Imports huggingface_hub only for a repo id, torch
never.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lading.checkpoint.catalog import Catalog, Shard
from lading.checkpoint.header import read_header
from lading.checkpoint.index import notes_on_index, read_index
from lading.checkpoint.joining import join
from lading.checkpoint.kinds import EXPECTED, foreign_format, kind_of
from lading.checkpoint.pickled import read_pickled
from lading.errors import CheckpointError, CheckpointNotFoundError, name_list, refusal

_LOG = logging.getLogger(__name__)
_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".npz", ".npy", ".h5", ".hdf5", ".onnx"),
    *(".msgpack", ".tflite", ".pb", ".zip", ".gz", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"),
)
"""How files are called that may hold weights, for a message about a directory in which none is found."""


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
    inner_key: str | None = None
    """Where a file of torch.save holds more than named tensors: the key of the dict of tensors inside, dots between the
    keys of dicts in dicts, such as ``"state_dict"`` of a training checkpoint. None: the file is that dict itself."""

    def candidates(self) -> tuple[str, ...]:
        """List the file names that this checkpoint may begin with, in the order they are tried."""
        if self.weights_name is not None:
            return (self.weights_name,)
        names = candidates(self.variant)
        return names if self.use_safetensors is None else names[:2] if self.use_safetensors else names[2:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Say what of a checkpoint can be read, and what is wrong with the rest. Immutable."""

    catalog: Catalog
    """Of the shards that could be read; perhaps of none."""
    faults: tuple[CheckpointError, ...]
    """Why `open_catalog` refuses the checkpoint; empty where it does not."""


def find_file(source: Source, name: str) -> Path | None:
    """Find one file beside a checkpoint, on disk or in the hub's cache or on the hub; None: it is not there.

    Raises:
        CheckpointNotFoundError: the hub does not say whether it is there.
    """
    path = Path(source.path_or_repo_id).expanduser()
    place = path.parent if path.is_file() else path / source.subfolder
    if path.exists():
        return place / name if (place / name).is_file() else None
    if path.is_absolute() or not _REPO_ID.fullmatch(source.path_or_repo_id):
        return None
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return _download(source, name)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # the first also: not in the cache
        return None
    except (HfHubHTTPError, OSError) as error:  # whether it is there cannot be told
        raise _not_on_hub(source, _first_line(error)) from error


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
    """Find and describe a checkpoint: read the headers of all its shards, and of data only what stands in two of them.

    What is amiss and does no harm is logged as a warning, each kind once with all names, and stays in `Catalog.notes`.

    Args:
        source: a path or repo id, or a `Source` with revision, subfolder and the like.

    Raises:
        CheckpointNotFoundError: nothing there, shards missing, or not in the local cache while offline.
        CheckpointError: see `lading.checkpoint.header`, `.index`, `.joining`, `.kinds` and `.pickled`.
    """
    survey = survey_checkpoint(source)
    if survey.faults:
        raise survey.faults[0]
    for note in survey.catalog.notes:
        _LOG.warning(note)
    return survey.catalog


def survey_checkpoint(source: Source | str | Path) -> Survey:
    """Describe as much of a checkpoint as can be read, and collect its faults. Refuses and logs nothing."""
    where = source if isinstance(source, Source) else Source(path_or_repo_id=str(source))
    faults: list[CheckpointError] = []
    try:
        _check_names(where)
        entry, fetch = find_entry(where)
        weight_map = read_index(entry) if kind_of(entry) == "json" else None
    except CheckpointError as error:
        return Survey(catalog=Catalog.of(()), faults=(error,))
    paths = [entry]
    if weight_map is not None:
        paths, missing = _fetch_all(sorted({os.path.normpath(name) for name in weight_map.values()}), fetch)
        faults += [_missing_shards(where, entry, missing, len(paths))] if missing else []
    more = (find_file(where, name) for name in where.more_names)
    shards: list[Shard] = []
    for path in dict.fromkeys([*paths, *(path for path in more if path is not None)]):
        try:
            shards.append(read_shard(path, where.inner_key))
        except CheckpointError as error:
            faults.append(error)
    catalog, doubled = join(shards)
    notes = [] if weight_map is None else notes_on_index(shards, weight_map, entry)
    return Survey(catalog=replace(catalog, notes=(*notes, *catalog.notes)), faults=(*faults, *doubled))


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


def _fetch_all(names: list[str], fetch: Callable[[str], Path]) -> tuple[list[Path], dict[str, str]]:
    """Reach all shards; give the paths of those that are there, and why each other is not."""
    paths: list[Path] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            path = fetch(name)
            if os.path.lexists(path) and not path.exists():
                raise FileNotFoundError(f"a link to {path.readlink()}, which is not there")
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            missing[name] = error.strerror or _first_line(error)
        except OSError:  # it is there, and whoever opens it says why it cannot be
            paths.append(path)
        else:
            paths.append(path)
    return paths, missing


def _missing_shards(source: Source, index: Path, missing: dict[str, str], num_present: int) -> CheckpointNotFoundError:
    is_local = Path(source.path_or_repo_id).expanduser().exists()
    return CheckpointNotFoundError(
        refusal(
            str(index),
            found=f"{num_present} of its {num_present + len(missing)} shards; missing are {name_list(missing)} "
            f"({next(iter(missing.values()))})",
            expected=f"all of them in {index.parent}",
            way_out="download those from the same revision"
            if is_local
            else f"run `hf download {source.path_or_repo_id}`, with a network and without HF_HUB_OFFLINE",
        )
    )


def read_shard(path: Path, inner_key: str | None = None) -> Shard:
    """Read one shard's table by the reader that its first bytes ask for.

    Args:
        path: the file, under any name.
        inner_key: see `Source`.

    Raises:
        CheckpointError: the reader's refusals, or those of `kind_of`; an ``inner_key`` for a file that has none.
    """
    kind = kind_of(path)
    if kind == "json":
        raise CheckpointError(
            refusal(str(path), found="JSON", expected=EXPECTED, way_out="name the shard that holds the tensors")
        )
    if kind != "safetensors":
        return read_pickled(path, inner_key)
    if inner_key is not None:
        raise CheckpointError(
            refusal(
                str(path),
                found=f"safetensors, and inner_key={inner_key!r}",
                expected="a file of torch.save, which may hold dicts in a dict",
                way_out="leave inner_key out",
            )
        )
    return read_header(path)


def find_entry(source: Source) -> tuple[Path, Callable[[str], Path]]:
    """Find the file a checkpoint begins with, and how its other files are reached by name.

    Raises:
        CheckpointNotFoundError: as for `open_catalog`.
    """
    path = Path(source.path_or_repo_id).expanduser()
    try:
        found = _find_on_disk(path, source)
    except PermissionError as error:
        reason, way_out = f"{error.strerror} for {error.filename}", "allow this user to read it (chmod u+rx)"
        raise CheckpointError(refusal(str(path), found=reason, expected="a readable place", way_out=way_out)) from error
    if found is not None:
        return found
    if path.is_absolute() or not _REPO_ID.fullmatch(source.path_or_repo_id):
        raise _nothing_there(source, "neither a file nor a directory")
    return _find_on_hub(source)


def _find_on_disk(path: Path, source: Source) -> tuple[Path, Callable[[str], Path]] | None:
    try:
        is_file, is_directory, is_link = path.is_file(), path.is_dir(), path.is_symlink()
    except PermissionError:
        raise
    except (OSError, ValueError):  # too long for a name, or not one
        return None
    if is_file:
        return path, lambda name: path.parent / name
    if is_directory:
        return _find_in_directory(path / source.subfolder, source)
    if is_link:
        raise _nothing_there(source, f"a link to {path.readlink()}, which is not there")
    return None


def _nothing_there(source: Source, found: str) -> CheckpointNotFoundError:
    expected = "a checkpoint file, its directory, or a repo id like 'org/name'"
    return CheckpointNotFoundError(
        refusal(source.path_or_repo_id, found=found, expected=expected, way_out="check the path")
    )


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
    weights = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS)
    if not weights:
        return "no weights" if any(directory.iterdir()) else "an empty directory"
    foreign = {path: what for path in weights[:5] if (what := foreign_format(path))}
    named = [path.name + (f" ({foreign[path]})" if path in foreign else "") for path in weights[:5]]
    return f"only {', '.join(named)}" + (f" … ({len(weights)} in all)" if len(weights) > 5 else "")


def _find_on_hub(source: Source) -> tuple[Path, Callable[[str], Path]]:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def shard(name: str) -> Path:
        try:
            return _download(source, name)
        except (EntryNotFoundError, OSError) as error:
            raise FileNotFoundError(_first_line(error)) from error

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
