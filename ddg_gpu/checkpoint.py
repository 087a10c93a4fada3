"""Weights on disk, and their fingerprint."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddg_sim.files import replacing

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file."""


def weights_sha256(model: nn.Sequential) -> str:
    """Fingerprint of all parameters and buffers, in the order of the stages; hexadecimal.

    It depends on names, shapes, types and every bit of the values, not on where the model is cut.

    >>> first, second = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    >>> weights_sha256(first) == weights_sha256(second)
    False
    >>> _ = second.load_state_dict(first.state_dict())
    >>> weights_sha256(first) == weights_sha256(second)
    True
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(model: nn.Sequential, path: Path, description: Mapping[str, Any]) -> None:
    """Write a model's weights and buffers; the file appears only when it is complete.

    Args:
        model: what to save.
        path: the file; its folder must exist.
        description: plain values that say where the weights come from.

    Raises:
        CheckpointError: naming the path if it cannot be written.
    """
    content = {"format": FORMAT, "description": dict(description), "weights": model.state_dict()}
    write_atomically(content, path)


def write_atomically(content: Mapping[str, Any], path: Path) -> None:
    """Write with `torch.save` to a temporary file beside ``path``, then rename it.

    Raises:
        CheckpointError: naming the path if it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            torch.save(dict(content), temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def load(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, without running any code in it.

    Raises:
        CheckpointError: naming the path if it is missing, broken or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # about foreign files, refused below
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many types for broken files, at great length
        raise CheckpointError(
            f"{path}: is no readable checkpoint: damaged, or not written by 'ddg train --save'"
        ) from error
    weights = content.get("weights") if isinstance(content, dict) else None
    if not (
        isinstance(weights, dict)
        and content.get("format") == FORMAT
        and all(isinstance(tensor, Tensor) for tensor in weights.values())
    ):
        raise CheckpointError(f"{path}: is not a checkpoint written by 'ddg train --save'")
    return weights


def load_into(model: nn.Sequential, path: Path) -> None:
    """Start a model from the weights of a checkpoint.

    Raises:
        CheckpointError: naming the path, and the first weight that does not fit.
    """
    weights = load(path)
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(own[name].shape) if name in own else "nothing"
            raise CheckpointError(
                f"{path}: is of another model: {name!r} is {found}, the model needs {wanted}"
            )
    model.load_state_dict(weights)
