"""Labelled images from disk: a folder or a tar archive becomes arrays, or one clear `DataError`.

Two layouts are read, each from a folder or from a tar archive, with at most one folder above them:

- the official CIFAR-10 batches for Python (https://www.cs.toronto.edu/~kriz/cifar.html);
- images `train/CLASS/NAME` and `test/CLASS/NAME`, JPEG or PNG, all of one size.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ddg_gpu.archive import DataError, files

Progress = Callable[[int, int], None]
"""Called with (done, total): bytes of the archive, or files of the folder."""

_PROGRESS_EVERY = 256  # files
_Bytes = npt.NDArray[np.uint8]
_Indices = npt.NDArray[np.int64]

_SPLITS = ("train", "test")
_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR_CLASSES = 10
_CIFAR_SHAPE = (3, 32, 32)

_BATCH = re.compile(r"([^/]+/)?(data_batch_[1-5]|test_batch)")
# Names that start with a dot are skipped: archives made on macOS hold a ._NAME beside every NAME.
_IMAGE = re.compile(r"([^/]+/)?(train|test)/([^/.][^/]*)/([^/.][^/]*\.(?i:jpe?g|png))")
_FOLDER_PATTERNS = tuple(
    top + inside for top in ("", "*/") for inside in ("*_batch*", "train/*/*", "test/*/*")
)


class LabelledImages(NamedTuple):
    """Images (uint8, N x C x H x W), class indices (int64, N), and what a reader should know."""

    train_inputs: _Bytes
    train_targets: _Indices
    test_inputs: _Bytes
    test_targets: _Indices
    classes: int
    note: str


class _Decoded(NamedTuple):
    pixels: _Bytes  # H x W x 3
    lossy: bool


_ImageKey = tuple[str, str, str]  # split, class, file name
_LabelledBatch = tuple[_Bytes, _Indices]


def read_images(path: Path, progress: Progress | None = None) -> LabelledImages:
    """Read the folder or archive `path`; class indices follow the sorted class names.

    Images come out sorted by class and file name, so a folder and an archive of it are equal.

    Raises:
        DataError: for anything that is missing, damaged, inconsistent or forbidden in `path`.

    Example:
        >>> read_images(Path("nowhere"))
        Traceback (most recent call last):
        ddg_gpu.archive.DataError: nowhere: no such file or folder; ...
    """
    batches: dict[str, _LabelledBatch] = {}
    images: dict[_ImageKey, _Decoded] = {}
    tops: set[str] = set()
    total = 0
    for count, file in enumerate(files(path, _wanted, _FOLDER_PATTERNS), start=1):
        if match := _BATCH.fullmatch(file.name):
            top, batch = match.groups(default="")
            batches[batch] = _read_batch(f"{path}: {file.name}", file.content)
        elif match := _IMAGE.fullmatch(file.name):
            top, split, label, image = match.groups(default="")
            images[split, label, image] = _decode(f"{path}: {file.name}", file.content)
        tops.add(top)
        total = file.total
        if progress and count % _PROGRESS_EVERY == 0:
            progress(file.done, total)
    if progress and total:
        progress(total, total)
    if len(tops) > 1 or (batches and images):
        raise DataError(f"{path}: holds more than one dataset; name the folder of one of them")
    if batches:
        return _join_batches(path, batches)
    if images:
        return _join_images(path, images)
    raise DataError(
        f"{path}: holds no dataset; expected train/CLASS/NAME.jpg|png and test/CLASS/NAME.jpg|png, "
        "or CIFAR-10's data_batch_1 ... test_batch"
    )


def _wanted(name: str) -> bool:
    return bool(_BATCH.fullmatch(name) or _IMAGE.fullmatch(name))


def _decode(where: str, content: bytes) -> _Decoded:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.mode.startswith(("I", "F")):  # converting these to RGB would clip the values
                raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
            return _Decoded(np.asarray(image.convert("RGB")), image.format == "JPEG")
    except Exception as error:  # whatever the decoder raises, the file is at fault
        reason = (
            "it is neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else error
        )
        raise DataError(
            f"{where}: this image does not decode ({reason}); replace or remove it"
        ) from error


def _join_images(path: Path, images: dict[_ImageKey, _Decoded]) -> LabelledImages:
    labels = {split: {label for part, label, _ in images if part == split} for split in _SPLITS}
    for split in _SPLITS:
        if not labels[split]:
            raise DataError(f"{path}: no images in {split}/; expected {split}/CLASS/NAME.jpg|png")
    if differing := sorted(labels["train"] ^ labels["test"]):
        raise DataError(
            f"{path}: train/ and test/ differ in their classes: only one of them has "
            f"{', '.join(differing)}; give both the same class folders"
        )
    first = next(iter(images))
    for key, image in images.items():
        if image.pixels.shape != images[first].pixels.shape:
            raise DataError(
                f"{path}: {'/'.join(key)} is {_size(image)} but {'/'.join(first)} is "
                f"{_size(images[first])}; resize all images to one size"
            )
    classes = sorted(labels["train"])
    train, test = (_stack(images, split, classes) for split in _SPLITS)
    lossy = any(image.lossy for image in images.values())
    return LabelledImages(*train, *test, len(classes), "JPEG images: lossy" if lossy else "")


def _size(image: _Decoded) -> str:
    height, width, _ = image.pixels.shape
    return f"{width}x{height}"


def _stack(
    images: dict[_ImageKey, _Decoded], split: str, classes: list[str]
) -> tuple[_Bytes, _Indices]:
    keys = sorted(key for key in images if key[0] == split)
    height, width, channels = images[keys[0]].pixels.shape
    inputs = np.empty((len(keys), channels, height, width), np.uint8)
    for row, key in enumerate(keys):
        inputs[row] = images[key].pixels.transpose(2, 0, 1)
    index = {label: number for number, label in enumerate(classes)}
    return inputs, np.array([index[label] for _, label, _ in keys], np.int64)


def _byte_type(spec: object, *_: object) -> np.dtype[np.uint8]:
    if spec not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it holds an array of type {spec!r}, not of bytes")
    return np.dtype(np.uint8, copy=True)  # a copy, for the unpickler sets its state


_REBUILD_ARRAY = np.empty(0).__reduce__()[0]
_UNPICKLABLE: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD_ARRAY,  # its name since NumPy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _byte_type,
}


class _BatchUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and arrays of bytes. Anything else is refused unrun."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _UNPICKLABLE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is forbidden")
        return _UNPICKLABLE[module, name]


def _read_batch(where: str, content: bytes) -> _LabelledBatch:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        inputs, labels = batch[b"data"], batch[b"labels"]
        if not all(type(label) is int and 0 <= label < _CIFAR_CLASSES for label in labels):
            raise ValueError("its labels are not whole numbers 0..9")
        if not labels:
            raise ValueError("it is empty")
        return inputs.reshape(len(labels), *_CIFAR_SHAPE), np.array(labels, np.int64)
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{where}: not an official CIFAR-10 batch ({error}); download CIFAR-10 again"
        ) from error


def _join_batches(path: Path, batches: dict[str, _LabelledBatch]) -> LabelledImages:
    if missing := [name for name in (*_TRAIN_BATCHES, "test_batch") if name not in batches]:
        raise DataError(f"{path}: {', '.join(missing)} missing; download CIFAR-10 again")
    inputs, targets = zip(*(batches[name] for name in _TRAIN_BATCHES), strict=True)
    return LabelledImages(
        np.concatenate(inputs), np.concatenate(targets), *batches["test_batch"], _CIFAR_CLASSES, ""
    )
