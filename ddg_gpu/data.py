"""Datasets as plain tensors, and mini-batches that are pure functions of their running index.

A process that holds one stage asks `Batches` for what that stage needs: the first stage for inputs,
the last for targets. Both are functions of (dataset, batch size, seed, sample) and of nothing else,
so processes agree without talking, whatever order a schedule asks in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ddg_gpu.archive import DataError
from ddg_gpu.image_files import Progress, read_images
from ddg_gpu.text import Text, built_in, read_text

__all__ = ["Batches", "DataError", "Dataset", "Progress", "load"]

_PADDING = 4  # pixels on each side before the random crop, as in He et al. 2016 and the DDG paper
_DIGITS_SPLIT_SEED = 0
_ORDER, _AUGMENT = 0, 1  # separate random streams of one seed


@dataclass(frozen=True, eq=False)  # eq: comparing tensors gives a tensor, not a truth value
class Dataset:
    """Labelled images, or texts: plain tensors, cheap to hand to another process.

    Of images, `train_inputs` and `test_inputs` are uint8, N x C x H x W, with values 0..`scale`;
    the targets are int64 class indices, N. `mean` and `std` (float32, C) are those of
    `train_inputs / scale`. Of a text, inputs and targets are int64 class indices, N x T, and there
    is nothing to normalise: `mean` and `std` are empty. `augment` says whether training crops and
    flips the images. `note` is what every accuracy measured on the data should say, such as "JPEG
    images: lossy"; it may be empty.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    scale: float
    mean: Tensor
    std: Tensor
    augment: bool
    note: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one example, or (characters,)."""
        return tuple(self.train_inputs.shape[1:])

    @property
    def example(self) -> Tensor:
        """A mini-batch of one example, as `Batches` gives it without augmentation."""
        return self.normalise(self.train_inputs[:1])

    def normalise(self, inputs: Tensor) -> Tensor:
        """Return uint8 `inputs` (N x C x H x W) as float32: scaled, less `mean`, over `std`.

        A channel that is constant in the training inputs is only centred. Characters (int64,
        N x T) stay what they are.

        Example:
            >>> digits = load("digits")
            >>> everything = digits.normalise(digits.train_inputs)
            >>> everything.mean().abs().item() < 1e-5, round(everything.std().item(), 3)
            (True, 1.0)
        """
        if inputs.dtype == torch.int64:
            return inputs
        std = torch.where(self.std > 0, self.std, torch.ones_like(self.std))
        shift = (self.mean * self.scale).view(-1, 1, 1)
        factor = (1 / (std * self.scale)).view(-1, 1, 1)
        return inputs.to(torch.float32).sub_(shift).mul_(factor)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets) over the whole test set, in order, normalised, not augmented.

        Raises:
            ValueError: when `batch_size` is less than 1.

        Example:
            >>> [len(targets) for _, targets in load("digits").test_batches(200)]
            [200, 160]
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1")
        return (
            (self.normalise(inputs), targets)
            for inputs, targets in zip(
                torch.split(self.test_inputs, batch_size),
                torch.split(self.test_targets, batch_size),
                strict=True,
            )
        )


def load(source: str | Path, *, progress: Progress | None = None) -> Dataset:
    """Load a dataset into memory.

    Args:
        source: `"digits"` (scikit-learn's 8x8 digits, a fixed stratified 80/20 split), `"text"`
            (characters of `text.stories`), the path of a `.txt` file, or that of a folder or tar
            archive: the official CIFAR-10 batches for Python, or images
            `train/CLASS/NAME.jpg|png` and `test/CLASS/NAME.jpg|png` of one size.
        progress: called now and then with (done, total), in bytes of the archive or files of the
            folder.

    Raises:
        DataError: (a `ValueError`) when the path is missing, damaged, inconsistent or forbidden.

    Example:
        >>> digits = load("digits")
        >>> digits.input_shape, digits.classes, len(digits.train_inputs), len(digits.test_inputs)
        ((1, 8, 8), 10, 1437, 360)
    """
    if source == "digits":
        return _digits()
    if source == "text":
        return _text(built_in(), "text", note="synthetic text, per character")
    path = Path(source)
    if path.suffix == ".txt":
        return _text(read_text(path), path.resolve().name, note="per character")
    images = read_images(path, progress)
    inputs = torch.from_numpy(images.train_inputs)
    mean, std = _statistics(inputs, scale=255)
    return Dataset(
        name=path.resolve().name,
        train_inputs=inputs,
        train_targets=torch.from_numpy(images.train_targets),
        test_inputs=torch.from_numpy(images.test_inputs),
        test_targets=torch.from_numpy(images.test_targets),
        classes=images.classes,
        scale=255,
        mean=mean,
        std=std,
        augment=True,
        note=images.note,
    )


def _digits() -> Dataset:
    # Imported here: scikit-learn takes about a second to load and serves this dataset only.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    inputs = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(targets)),
        test_size=0.2,
        stratify=digits.target,
        random_state=_DIGITS_SPLIT_SEED,
    )
    mean, std = _statistics(inputs[train], scale=16)
    return Dataset(
        name="digits",
        train_inputs=inputs[train],
        train_targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
        classes=10,
        scale=16,
        mean=mean,
        std=std,
        augment=False,
        note="",
    )


def _text(text: Text, name: str, note: str) -> Dataset:
    return Dataset(
        name=name,
        train_inputs=torch.from_numpy(text.train_inputs),
        train_targets=torch.from_numpy(text.train_targets),
        test_inputs=torch.from_numpy(text.test_inputs),
        test_targets=torch.from_numpy(text.test_targets),
        classes=len(text.alphabet),
        scale=1,
        mean=torch.empty(0),
        std=torch.empty(0),
        augment=False,
        note=note,
    )


def _statistics(inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of `inputs / scale`."""
    channels = inputs.shape[1]
    total = torch.zeros(channels, dtype=torch.float64)
    squares = torch.zeros(channels, dtype=torch.float64)
    # In chunks, to spare memory. Sums of whole numbers are exact in float64, in any order.
    for chunk in torch.split(inputs, 1000):
        values = chunk.to(torch.float64)
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = inputs.numel() / channels
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return (mean / scale).float(), (std / scale).float()


class Batches:
    """The endless stream of training mini-batches; `sample` is a mini-batch's running index.

    Every epoch visits the training set once in an order drawn from (seed, epoch). The last
    mini-batch of an epoch is smaller where the sizes do not divide; it is never padded. One case is
    left out: a last mini-batch of a single example, where others have more, is dropped, because
    BatchNorm cannot train on one value per channel. Where the dataset asks for augmentation,
    `inputs` pads each image with 4 black pixels (raw value 0) on each side, takes a random crop of
    the original size and flips half of the crops left to right, drawn from (seed, sample)
    (He et al. 2016, section 4.2), then normalises.

    Args:
        dataset: where the examples come from.
        batch_size: examples per mini-batch, 1 .. number of training examples.
        seed: not negative; the stream is a function of it and of nothing else that is random.

    Raises:
        ValueError: when `batch_size`, `seed`, or later a `sample`, is out of range.

    Example:
        >>> batches = Batches(load("digits"), batch_size=100, seed=0)
        >>> batches.per_epoch, batches.size(0), batches.size(14)
        (15, 100, 37)
        >>> batches.inputs(14).shape, batches.targets(14).shape
        (torch.Size([37, 1, 8, 8]), torch.Size([37]))
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self._examples = len(dataset.train_targets)
        if not 1 <= batch_size <= self._examples:
            raise ValueError(
                f"batch_size={batch_size!r} must be 1 .. {self._examples}, the training examples"
            )
        if seed < 0:
            raise ValueError(f"seed={seed!r} must not be negative")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @cached_property
    def per_epoch(self) -> int:
        """Mini-batches in one epoch."""
        whole, rest = divmod(self._examples, self.batch_size)
        return whole + (rest > 1)

    def size(self, sample: int) -> int:
        """Return the number of examples in mini-batch `sample`."""
        _, start = self._locate(sample)
        return min(self.batch_size, self._examples - start)

    def targets(self, sample: int) -> Tensor:
        """Return the class indices of mini-batch `sample`: int64, N or N x T."""
        return self.dataset.train_targets[self._rows(sample)]

    def inputs(self, sample: int) -> Tensor:
        """Return mini-batch `sample`: images, float32, N x C x H x W, normalised; or tokens."""
        raw = self.dataset.train_inputs[self._rows(sample)]
        if self.dataset.augment:
            random = np.random.default_rng([self.seed, _AUGMENT, sample])
            raw = _crop_and_flip(raw, random)
        return self.dataset.normalise(raw)

    def _locate(self, sample: int) -> tuple[int, int]:
        """Epoch, and first position in its order."""
        if sample < 0:
            raise ValueError(f"sample={sample!r} must not be negative")
        epoch, number = divmod(sample, self.per_epoch)
        return epoch, number * self.batch_size

    def _rows(self, sample: int) -> Tensor:
        epoch, start = self._locate(sample)
        return torch.from_numpy(self._order(epoch)[start : start + self.batch_size])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        orders = self._orders
        if epoch not in orders:
            random = np.random.default_rng([self.seed, _ORDER, epoch])
            # Two epochs are kept: a pipeline asks for inputs of one while targets of the one
            # before are still due. Rebound, not changed, so that threads may share the object.
            last = dict(list(orders.items())[-1:])
            self._orders = orders = {**last, epoch: random.permutation(self._examples)}
        return orders[epoch]


def _crop_and_flip(images: Tensor, random: np.random.Generator) -> Tensor:
    """Pad `images` (N x C x H x W) with zeros, crop each at random, flip each at random."""
    count, channels, height, width = images.shape
    top = torch.from_numpy(random.integers(0, 2 * _PADDING + 1, (count, 1)))
    left = torch.from_numpy(random.integers(0, 2 * _PADDING + 1, (count, 1)))
    flip = torch.from_numpy(random.integers(0, 2, (count, 1))).bool()
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(flip, columns.flip(1), columns)
    # One gather over flattened pixels: four times as fast as indexing rows and columns.
    padded = functional.pad(images, (_PADDING,) * 4).flatten(2)
    pixels = rows[:, :, None] * (width + 2 * _PADDING) + columns[:, None, :]
    index = pixels.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.gather(2, index).view(count, channels, height, width)
