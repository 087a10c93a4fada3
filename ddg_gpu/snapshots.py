"""Snapshots: everything of a run at one instant, in a folder from which it goes on bit for bit.

A snapshot is a folder ``iteration-N`` of tensors, written by torch.distributed.checkpoint, and of
plain values, one JSON file per process. It is written beside its place and renamed when all of it
is there, with a manifest that holds the digest of every file: so a snapshot is whole or it is not
there. All processes must see the same folder.

torch.distributed.checkpoint describes its files in a pickle. It is read here first, by a reader
that makes nothing but descriptions of tensors, so that a snapshot from elsewhere cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ddg_gpu.checkpoint import CheckpointError
from ddg_sim.files import replacing

FORMAT = 2
_MANIFEST = "manifest.json"
_NAME = re.compile(r"iteration-(\d+)")


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Where and when snapshots are written.

    Args:
        folder: their folder; made if it is not there.
        every: iterations between two.
        keep: how many of the newest ones stay.
        flush: whether to use up all samples in flight before each. That changes the course of the
            training (its delays begin anew), but the run can go on with other stages.

    Raises:
        ValueError: naming the argument.

    >>> Snapshots(Path("run"), every=0)
    Traceback (most recent call last):
    ...
    ValueError: every must be at least 1, got 0
    """

    folder: Path
    every: int = 100
    keep: int = 2
    flush: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def write(
    snapshots: Snapshots,
    iteration: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    description: Mapping[str, Any],
) -> Path:
    """Write a snapshot, together with all processes of the process group, if there is one.

    Args:
        snapshots: where; others are deleted, but for the newest older ones to keep.
        iteration: how many iterations were fed.
        tensors: this process's, by names that no other process uses.
        values: this process's plain values (JSON), by names that no other process uses.
        description: of the run; the same in all processes.

    Raises:
        CheckpointError: naming the folder, if it cannot be written; it is as it was then.
    """
    together = dist.is_initialized()
    rank = dist.get_rank() if together else 0
    path = snapshots.folder / f"iteration-{iteration}"
    partial = snapshots.folder / f".iteration-{iteration}.partial"
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if together:
            dist.barrier()
        own = {"values": dict(values), "tensors": {k: _layout(v) for k, v in tensors.items()}}
        (partial / f"process-{rank}.json").write_text(json.dumps(own))
        with warnings.catch_warnings(action="ignore"):  # that there is a single process
            save(dict(tensors), checkpoint_id=partial, no_dist=not together)
        if rank == 0:
            manifest = {
                "format": FORMAT,
                "iteration": iteration,
                "description": dict(description),
                "processes": dist.get_world_size() if together else 1,
                "sha256": {file.name: _digest(file) for file in sorted(partial.iterdir())},
            }
            with replacing(partial / _MANIFEST) as file:
                file.write_text(json.dumps(manifest))
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            found = _found(snapshots.folder)
            # Later ones are damaged: the run did not go on from them.
            stay = [old for number, old in found if number <= iteration][-snapshots.keep :]
            for _, old in found:
                if old not in stay:
                    shutil.rmtree(old, ignore_errors=True)
        if together:
            dist.barrier()
    except (OSError, CheckpointException) as error:
        reason = error.strerror if isinstance(error, OSError) else _reason(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}") from None
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def newest(folder: Path, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest whole snapshot of a folder; None if there is none at all.

    Args:
        folder: where to look.
        warn: told of newer ones that are damaged.

    Raises:
        CheckpointError: naming the oldest, if all are damaged.

    >>> newest(Path("no such folder")) is None
    True
    """
    damaged: CheckpointError | None = None
    for _, path in reversed(_found(folder)):
        if damaged is not None:
            warn(f"{damaged}; taking the one before")
        try:
            return read(path).path
        except CheckpointError as error:
            damaged = error
    if damaged is not None:
        raise damaged
    return None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot holds.

    Args:
        iteration: how many iterations were fed before it.
        description: of the run.
        values: of all processes together.
    """

    path: Path
    iteration: int
    description: dict[str, Any]
    values: dict[str, Any]
    _layouts: dict[str, list[Any]]

    def tensors(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Load the tensors whose names are wanted.

        Raises:
            CheckpointError: naming the snapshot, if they cannot be read.
        """
        found = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self._layouts.items()
            if wanted(name)
        }
        try:
            with warnings.catch_warnings(action="ignore"):  # that there is a single process
                load(found, checkpoint_id=self.path, no_dist=True)
        except Exception as error:  # torch raises many types for files it cannot read
            raise CheckpointError(f"{self.path}: cannot be read: {_reason(error)}") from None
        return found


def read(path: Path) -> Snapshot:
    """Open a snapshot and check that all of it is there; runs no code in it.

    Raises:
        CheckpointError: naming the snapshot, and the file that is missing or damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: is of format {manifest['format']}, not {FORMAT}")
        for name, digest in manifest["sha256"].items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path}: {name} is missing")
            if _digest(path / name) != digest:
                raise CheckpointError(f"{path}: {name} is damaged")
        values: dict[str, Any] = {}
        layouts: dict[str, list[Any]] = {}
        for rank in range(manifest["processes"]):
            own = json.loads((path / f"process-{rank}.json").read_text())
            values |= own["values"]
            layouts |= own["tensors"]
        _only_tensors(path)
        return Snapshot(path, manifest["iteration"], manifest["description"], values, layouts)
    except OSError as error:
        name = Path(str(error.filename)).name
        raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is no snapshot of a training run") from None


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Snapshots, whole or damaged, oldest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def _layout(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """The first line that says what happened."""
    failures = getattr(error, "failures", None)
    if failures:  # of torch.distributed.checkpoint: (error, traceback) by rank
        error = next(iter(failures.values()))[0]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "inline_container" in lines[0]:  # how torch says that a write has failed
        return "a file could not be written whole: is the disk full?"
    return lines[0]


class _Descriptions(pickle.Unpickler):
    """Reads descriptions of tensors, and refuses to make anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if not (
            (module == "torch" and (name == "Size" or hasattr(torch, name) and _is_dtype(name)))
            or (module == "torch.serialization" and name == "_get_layout")
            or (module == "torch.distributed.checkpoint.metadata" and name in _METADATA)
            or (module == "torch.distributed.checkpoint.filesystem" and name == "_StorageInfo")
            or (module.split(".")[0] == "pathlib" and name.endswith("Path"))
        ):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


_METADATA = {
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name), torch.dtype)


def _only_tensors(path: Path) -> None:
    """Check that torch's own reader will make nothing but tensors."""
    try:
        with (path / ".metadata").open("rb") as file:
            found = _Descriptions(file).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: .metadata holds more than tensors: {error}") from None
    entries = found.state_dict_metadata if isinstance(found, Metadata) else {"": None}
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
        raise CheckpointError(f"{path}: .metadata holds more than tensors")
