"""Datasets and mini-batches: what is read, what is refused, and that nothing depends on order."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddg_gpu.data import Batches, DataError, Dataset, load

COLOURS = {"cat": (200, 10, 10), "ant": (10, 200, 10), "bee": (10, 10, 200)}


# --- small datasets on disk -----------------------------------------------------------------------


def encoded(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (6, 5)) -> bytes:
    """A one-coloured PNG of (width, height)."""
    return encoded(np.full((size[1], size[0], 3), colour, np.uint8))


def image_files() -> dict[str, bytes]:
    """Three training images and one test image per class, each of its own shade."""
    files = {}
    for label, (red, green, blue) in COLOURS.items():
        for number in range(3):
            files[f"train/{label}/{number:04}.png"] = plain((red + number, green, blue))
        files[f"test/{label}/0000.png"] = plain((red + 50, green, blue))
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


class Python2Pickler(pickle._Pickler):  # type: ignore[misc, name-defined]
    """Writes bytes as Python 2 wrote its strings, as in the official batches."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    # The official files were written with NumPy 1, whose module has this name.
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batch_pixels(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)


def batch_files(**replaced: bytes) -> dict[str, bytes]:
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {}
    for seed, name in enumerate(names):
        content = {
            b"data": batch_pixels(seed),
            b"labels": [seed, 1, 2, 9],
            b"batch_label": b"a batch",
            b"filenames": [b"a.png"] * 4,
        }
        files[f"cifar-10-batches-py/{name}"] = replaced.get(name, python2_pickle(content))
    return files


def same(left: Dataset, right: Dataset) -> bool:
    tensors = ("train_inputs", "train_targets", "test_inputs", "test_targets", "mean", "std")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)


# --- loading --------------------------------------------------------------------------------------


def test_digits_are_split_80_to_20_and_stratified() -> None:
    digits = load("digits")
    assert digits.train_inputs.shape == (1437, 1, 8, 8)
    assert digits.test_inputs.shape == (360, 1, 8, 8)
    assert (digits.train_inputs.dtype, digits.train_targets.dtype) == (torch.uint8, torch.int64)
    assert digits.train_inputs.max() == 16
    whole = torch.bincount(torch.cat([digits.train_targets, digits.test_targets]))
    # Stratified: every class has a fifth of its examples in the test set, to the nearest example.
    assert (torch.bincount(digits.test_targets) - whole / 5).abs().max() < 1
    assert not digits.augment


def test_digits_split_is_fixed_and_disjoint() -> None:
    first, second = load("digits"), load("digits")
    assert same(first, second)
    from sklearn.datasets import load_digits

    expected = Counter(image.astype(np.uint8).tobytes() for image in load_digits().images)
    both = torch.cat([first.train_inputs, first.test_inputs])
    assert Counter(image.numpy().tobytes() for image in both) == expected


def test_image_folder_has_sorted_classes_and_sorted_files(tmp_path: Path) -> None:
    dataset = load(str(write_folder(tmp_path / "pictures", image_files())))
    assert dataset.name == "pictures"
    assert dataset.classes == 3
    assert dataset.input_shape == (3, 5, 6)
    assert dataset.train_targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # ant, bee, cat
    assert dataset.test_targets.tolist() == [0, 1, 2]
    assert dataset.train_inputs[7, :, 2, 3].tolist() == [201, 10, 10]  # the second cat
    assert dataset.test_inputs[1, :, 0, 0].tolist() == [60, 10, 200]  # the bee
    assert dataset.augment
    assert dataset.note == ""  # PNG loses nothing


def test_pixels_keep_their_place(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    files = image_files() | {"train/ant/0000.png": encoded(pixels)}
    dataset = load(write_folder(tmp_path, files))
    assert np.array_equal(dataset.train_inputs[0].numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("top", ["", "./", "pictures/"])
def test_archive_equals_folder(tmp_path: Path, mode: str, top: str) -> None:
    files = image_files()
    shuffled = {top + name: files[name] for name in reversed(files)}
    archive = write_tar(tmp_path / "pictures.tar", shuffled, mode)
    assert same(load(archive), load(write_folder(tmp_path / "folder", files)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pictures.tar"]


def test_other_files_and_hidden_copies_are_ignored(tmp_path: Path) -> None:
    extra = {"README.txt": b"hello", "train/cat/._0000.png": b"junk", "train/notes.md": b"x"}
    with_extra = load(write_tar(tmp_path / "a.tar", image_files() | extra))
    assert same(with_extra, load(write_folder(tmp_path / "folder", image_files())))


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    grey = encoded(np.full((5, 6), 77, np.uint8))
    dataset = load(write_folder(tmp_path, image_files() | {"train/ant/0000.png": grey}))
    assert dataset.train_inputs[0].unique().tolist() == [77]


def test_jpeg_is_noted_as_lossy_whatever_the_file_is_called(tmp_path: Path) -> None:
    jpeg = encoded(np.full((5, 6, 3), 90, np.uint8), "JPEG")
    for number, name in enumerate(("train/ant/0000.JPG", "train/ant/0000.png")):
        folder = write_folder(tmp_path / str(number), image_files() | {name: jpeg})
        assert load(folder).note == "JPEG images: lossy"


def test_official_batches_from_folder_parent_and_archive(tmp_path: Path) -> None:
    parent = write_folder(tmp_path / "data", batch_files())
    dataset = load(parent / "cifar-10-batches-py")
    assert dataset.input_shape == (3, 32, 32)
    assert (dataset.classes, dataset.note, dataset.augment) == (10, "", True)
    assert dataset.train_targets.tolist() == [n for s in range(5) for n in (s, 1, 2, 9)]
    assert dataset.test_targets.tolist() == [5, 1, 2, 9]
    # A row holds 1024 red, 1024 green and 1024 blue values, each row by row of the image.
    assert dataset.train_inputs[4, 2, 3, 7] == batch_pixels(1)[0, 2 * 1024 + 3 * 32 + 7]
    assert same(dataset, load(parent))
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", batch_files(), "w:gz")
    assert same(dataset, load(archive))


def test_the_pickles_of_these_tests_look_like_the_official_ones() -> None:
    content = batch_files()["cifar-10-batches-py/test_batch"]
    assert content.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    assert b"_codecs" not in content


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_progress_rises_to_the_total(tmp_path: Path, kind: str) -> None:
    many = {f"train/cat/x{number}.png": plain((1, 2, 3)) for number in range(600)} | image_files()
    path = (
        write_folder(tmp_path / "folder", many)
        if kind == "folder"
        else write_tar(tmp_path / "a.tar", many)
    )
    seen: list[tuple[int, int]] = []
    load(path, progress=lambda done, total: seen.append((done, total)))
    dones = [done for done, _ in seen]
    total = len(many) if kind == "folder" else path.stat().st_size
    assert dones == sorted(dones)
    assert len(seen) == 3
    assert {total for _, total in seen} == {total}
    assert dones[-1] == total


def test_an_error_of_the_progress_display_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    def broken(done: int, total: int) -> None:
        raise BrokenPipeError("the display is gone")

    path = write_tar(tmp_path / "a.tar", image_files())
    with pytest.raises(BrokenPipeError, match="the display is gone"):
        load(path, progress=broken)


def test_statistics_are_those_of_the_training_inputs(tmp_path: Path) -> None:
    dataset = load(write_folder(tmp_path, batch_files()))
    values = dataset.train_inputs.double() / 255
    assert torch.allclose(dataset.mean.double(), values.mean(dim=(0, 2, 3)), atol=1e-7)
    assert torch.allclose(dataset.std.double(), values.std(dim=(0, 2, 3), correction=0), atol=1e-7)
    normal = dataset.normalise(dataset.train_inputs)
    assert normal.dtype == torch.float32
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normal.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    expected = (values - dataset.mean.double().view(3, 1, 1)) / dataset.std.double().view(3, 1, 1)
    assert torch.allclose(normal.double(), expected, atol=1e-5)


def test_a_constant_channel_is_centred_not_divided_by_zero(tmp_path: Path) -> None:
    files = {name: plain((7, 7, 7)) for name in image_files()}
    dataset = load(write_folder(tmp_path, files))
    assert dataset.normalise(dataset.train_inputs).abs().max() < 1e-5


def test_a_dataset_survives_the_way_to_another_process() -> None:
    digits = load("digits")
    assert same(pickle.loads(pickle.dumps(digits)), digits)


# --- refusals -------------------------------------------------------------------------------------


def refused(path: Path, text: str) -> None:
    """`path` gives one line that names it and matches `text`."""
    with pytest.raises(DataError, match=text) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)


def test_missing_path(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file or folder; give a folder or a tar archive")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bhello", b"BZh9hello", b"x" * 5000])
def test_not_an_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(path, r"not a tar archive \(plain, gz, bz2 or xz\)|the archive ends too early")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.8])
def test_truncated_archive(tmp_path: Path, mode: str, part: float) -> None:
    content = write_tar(tmp_path / "whole", batch_files(), mode).read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(content[: int(len(content) * part)])
    refused(path, "the archive ends too early or is damaged; copy or download it again")


def test_archive_cut_exactly_between_two_members(tmp_path: Path) -> None:
    """tarfile alone takes this for a complete archive, and images would be missing silently."""
    whole = write_tar(tmp_path / "whole", image_files())
    with tarfile.open(whole) as archive:
        end_of_last = archive.getmembers()[-1].offset
    path = tmp_path / "cut"
    path.write_bytes(whole.read_bytes()[:end_of_last])
    refused(path, "ends too early")


def test_archive_with_a_damaged_header(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole", image_files())
    with tarfile.open(whole) as archive:
        offset = archive.getmembers()[-1].offset
    content = bytearray(whole.read_bytes())
    content[offset + 5] ^= 0xFF
    path = tmp_path / "damaged"
    path.write_bytes(content)
    refused(path, "ends too early or is damaged")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_archive_with_a_wrong_checksum(tmp_path: Path, mode: str) -> None:
    content = bytearray(write_tar(tmp_path / "whole", image_files(), mode).read_bytes())
    where = -6 if mode == "w:gz" else len(content) // 2  # gzip ends with its checksum
    content[where] ^= 0xFF
    path = tmp_path / "damaged"
    path.write_bytes(content)
    refused(path, "damaged")


def test_link_in_an_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", image_files())
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/cat/0009.png")
        link.type, link.linkname = tarfile.LNKTYPE, "train/cat/0000.png"
        archive.addfile(link)
    refused(path, "train/cat/0009.png is a link; archive the files themselves")


def test_empty_folder_and_archive(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "holds no dataset; expected train/CLASS/NAME")
    refused(write_tar(tmp_path / "a.tar", {"notes.txt": b"x"}), "holds no dataset")


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_split(tmp_path: Path, missing: str) -> None:
    files = {name: data for name, data in image_files().items() if not name.startswith(missing)}
    refused(write_folder(tmp_path, files), f"no images in {missing}/; expected {missing}/CLASS")


def test_different_classes(tmp_path: Path) -> None:
    files = image_files() | {"test/dog/0000.png": plain((0, 0, 0))}
    del files["test/bee/0000.png"]
    refused(write_folder(tmp_path, files), "differ in their classes: only .* has bee, dog;")


@pytest.mark.parametrize("junk", [b"", b"not an image", plain((1, 2, 3), (60, 50))[:90]])
def test_image_that_does_not_decode(tmp_path: Path, junk: bytes) -> None:
    files = image_files() | {"train/cat/0001.png": junk}
    for path in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "a.tar", files)):
        refused(path, r"train/cat/0001.png: this image does not decode \(.*\); replace or remove")


def test_image_that_rgb_would_clip(tmp_path: Path) -> None:
    deep = encoded(np.full((5, 6), 60_000, np.uint16))
    files = image_files() | {"train/cat/0001.png": deep}
    refused(write_folder(tmp_path, files), "0001.png: .*more than 8 bits per channel")


def test_images_of_different_sizes(tmp_path: Path) -> None:
    files = image_files() | {"train/cat/0001.png": plain((1, 2, 3), (9, 4))}
    refused(
        write_folder(tmp_path, files), "train/cat/0001.png is 9x4 but .* is 6x5; resize all images"
    )


def test_two_datasets_in_one_folder(tmp_path: Path) -> None:
    files = image_files()
    twice = files | {f"copy/{name}": content for name, content in files.items()}
    refused(write_folder(tmp_path / "a", twice), "more than one dataset")
    refused(write_folder(tmp_path / "b", files | batch_files()), "more than one dataset")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "Ran out of input"),
        (b"\x80\x02junk", "not an official CIFAR-10 batch"),
        (python2_pickle([1, 2]), "not an official CIFAR-10 batch"),
        (python2_pickle({b"data": batch_pixels(0)}), "labels"),
        (python2_pickle({b"data": batch_pixels(0)[:, :9], b"labels": [1] * 4}), "reshape"),
        (python2_pickle({b"data": batch_pixels(0), b"labels": [1] * 3}), "reshape"),
        (python2_pickle({b"data": batch_pixels(0), b"labels": [1, 2, 3, 10]}), "0..9"),
        (python2_pickle({b"data": batch_pixels(0)[:0], b"labels": []}), "empty"),
        (python2_pickle({b"data": np.zeros((1, 3072)), b"labels": [1]}), "not of bytes"),
        (python2_pickle({b"data": b"x" * 3072, b"labels": [1]}), "reshape"),
    ],
)
def test_broken_batch(tmp_path: Path, content: bytes, text: str) -> None:
    folder = write_folder(tmp_path, batch_files(data_batch_3=content))
    refused(folder, f"cifar-10-batches-py/data_batch_3: .*{text}.*download CIFAR-10 again")


def test_truncated_batch(tmp_path: Path) -> None:
    content = batch_files()["cifar-10-batches-py/data_batch_1"][:5000]
    refused(write_folder(tmp_path, batch_files(data_batch_1=content)), "data_batch_1: not an")


def test_missing_batch(tmp_path: Path) -> None:
    files = batch_files()
    del files["cifar-10-batches-py/data_batch_4"]
    refused(write_folder(tmp_path, files), "data_batch_4 missing; download CIFAR-10 again")


class Evil:
    """Unpickling this with the ordinary unpickler creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return io.open, (str(self.target), "w")


@pytest.mark.parametrize("dump", [python2_pickle, pickle.dumps])
def test_forbidden_pickle_is_refused_and_not_run(
    tmp_path: Path, dump: Callable[[object], bytes]
) -> None:
    target = tmp_path / "created"
    content = dump({b"data": Evil(target), b"labels": [1]})
    folder = write_folder(tmp_path / "data", batch_files(test_batch=content))
    refused(folder, r"test_batch: .*asks for \w+.open, which is forbidden")
    assert not target.exists()
    pickle.loads(content, encoding="bytes")[b"data"].close()
    assert target.exists()  # so the test could have failed


# --- mini-batches ---------------------------------------------------------------------------------


def coloured(examples: int, augment: bool = True) -> Dataset:
    """Random 3x10x12 images, all different; the target of an image is its number."""
    shape = (examples, 3, 10, 12)
    pixels = np.random.default_rng(7).integers(1, 256, shape, dtype=np.uint8)
    inputs, targets = torch.from_numpy(pixels), torch.arange(examples)
    return Dataset(
        name="coloured",
        train_inputs=inputs,
        train_targets=targets,
        test_inputs=inputs[:5],
        test_targets=targets[:5],
        classes=examples,
        scale=255,
        mean=torch.tensor([0.4, 0.5, 0.6]),
        std=torch.tensor([0.2, 0.25, 0.3]),
        augment=augment,
        note="",
    )


def pixels_of(dataset: Dataset, normalised: Tensor) -> np.ndarray[Any, Any]:
    """Undo `normalise`, independently of it."""
    scaled = normalised.double() * dataset.std.view(3, 1, 1) + dataset.mean.view(3, 1, 1)
    return (scaled * 255).round().to(torch.uint8).numpy()


def all_crops(image: np.ndarray[Any, Any]) -> dict[bytes, tuple[int, int, bool]]:
    """Every result that augmentation may have for one image, made pixel by pixel's definition."""
    channels, height, width = image.shape
    crops = {}
    for top in range(-4, 5):
        for left in range(-4, 5):
            crop = np.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    if 0 <= row + top < height and 0 <= column + left < width:
                        crop[:, row, column] = image[:, row + top, column + left]
            crops[crop.tobytes()] = (top, left, False)
            crops[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    return crops


def test_augmented_images_are_crops_of_the_right_image_and_every_crop_occurs() -> None:
    dataset = coloured(4)
    originals = [all_crops(image) for image in dataset.train_inputs.numpy()]
    assert len(originals[0]) == 9 * 9 * 2
    batches = Batches(dataset, 4, seed=0)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for sample in range(600):
        images = pixels_of(dataset, batches.inputs(sample))
        for image, target in zip(images, batches.targets(sample).tolist(), strict=True):
            seen[originals[target][image.tobytes()]] += 1  # KeyError: not a crop of that image
    # 2400 draws over 162 equally likely outcomes: about 15 each.
    assert len(seen) == 162
    assert max(seen.values()) < 45
    assert 0.45 < sum(n for (_, _, flip), n in seen.items() if flip) / 2400 < 0.55


def test_without_augmentation_inputs_are_the_normalised_images() -> None:
    dataset = coloured(10, augment=False)
    batches = Batches(dataset, 4, seed=1)
    for sample in range(6):
        expected = dataset.train_inputs[batches.targets(sample)].numpy()
        assert np.array_equal(pixels_of(dataset, batches.inputs(sample)), expected)


def test_the_stream_does_not_depend_on_the_order_of_calls_or_on_global_generators() -> None:
    dataset = coloured(10)
    order = Batches(dataset, 4, seed=5)
    expected = [(order.inputs(sample), order.targets(sample)) for sample in range(9)]
    torch.manual_seed(99)
    fresh = Batches(dataset, 4, seed=5)
    for sample in (8, 0, 3, 3, 7, 1, 6, 2, 5, 4, 0):
        assert torch.equal(fresh.targets(sample), expected[sample][1])
        assert torch.equal(fresh.inputs(sample), expected[sample][0])
    lone = Batches(dataset, 4, seed=5)
    assert torch.equal(lone.inputs(7), expected[7][0])


def test_global_generators_are_not_touched() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    Batches(coloured(10), 4, seed=5).inputs(0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


def test_every_epoch_visits_every_example_once_in_its_own_order() -> None:
    batches = Batches(coloured(10), 4, seed=2)
    epochs = [
        torch.cat([batches.targets(epoch * 3 + number) for number in range(3)]).tolist()
        for epoch in range(4)
    ]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Batches(coloured(10), 4, seed=3)
    assert torch.cat([other.targets(number) for number in range(3)]).tolist() != epochs[0]


def test_mini_batches_of_one_epoch_are_augmented_independently() -> None:
    dataset = coloured(8)
    originals = [all_crops(image) for image in dataset.train_inputs.numpy()]
    batches = Batches(dataset, 4, seed=0)
    drawn = [
        [
            originals[target][image.tobytes()]
            for image, target in zip(
                pixels_of(dataset, batches.inputs(sample)),
                batches.targets(sample).tolist(),
                strict=True,
            )
        ]
        for sample in (0, 1)
    ]
    assert drawn[0] != drawn[1]


def test_an_example_is_augmented_anew_every_epoch_and_for_every_seed() -> None:
    dataset = coloured(4)
    first, second = Batches(dataset, 4, seed=0), Batches(dataset, 4, seed=1)
    images = [first.inputs(0), first.inputs(1), second.inputs(0)]
    targets = [first.targets(0), first.targets(1), second.targets(0)]
    sorted_images = [image[target.argsort()] for image, target in zip(images, targets, strict=True)]
    assert not torch.equal(sorted_images[0], sorted_images[1])
    assert not torch.equal(sorted_images[0], sorted_images[2])


@pytest.mark.parametrize(
    ("examples", "batch_size", "sizes"),
    [
        (10, 5, [5, 5]),
        (10, 4, [4, 4, 2]),  # the ragged batch is smaller
        (10, 3, [3, 3, 3]),  # one example is left over: dropped, for BatchNorm's sake
        (10, 10, [10]),
        (3, 1, [1, 1, 1]),  # a batch size of one was asked for
        (1, 1, [1]),
    ],
)
def test_sizes_of_an_epoch(examples: int, batch_size: int, sizes: list[int]) -> None:
    batches = Batches(coloured(examples), batch_size, seed=0)
    assert batches.per_epoch == len(sizes)
    two_epochs = range(2 * len(sizes))
    assert [batches.size(sample) for sample in two_epochs] == sizes * 2
    assert [len(batches.inputs(sample)) for sample in two_epochs] == sizes * 2
    assert [len(batches.targets(sample)) for sample in two_epochs] == sizes * 2


def test_the_dropped_example_is_another_one_in_another_epoch() -> None:
    batches = Batches(coloured(10), 3, seed=0)
    dropped = set()
    for epoch in range(20):
        visited = torch.cat([batches.targets(3 * epoch + number) for number in range(3)]).tolist()
        assert len(set(visited)) == 9
        dropped |= set(range(10)) - set(visited)
    assert len(dropped) > 5


def test_test_batches_cover_the_test_set_in_order() -> None:
    dataset = coloured(10)
    found = list(dataset.test_batches(2))
    assert [len(targets) for _, targets in found] == [2, 2, 1]
    assert torch.equal(torch.cat([targets for _, targets in found]), dataset.test_targets)
    pixels = pixels_of(dataset, torch.cat([inputs for inputs, _ in found]))
    assert np.array_equal(pixels, dataset.test_inputs.numpy())


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_size_out_of_range(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} must be 1 \.\. 10"):
        Batches(coloured(10), batch_size, seed=0)


def test_other_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        Batches(coloured(10), 2, seed=-1)
    for method in (Batches.size, Batches.inputs, Batches.targets):
        with pytest.raises(ValueError, match="sample=-1 must not be negative"):
            method(Batches(coloured(10), 2, seed=0), -1)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        coloured(10).test_batches(0)


# --- the real archive -----------------------------------------------------------------------------


@pytest.mark.slow
def test_cifar10_archive() -> None:
    parents = Path(__file__).resolve().parents
    candidates = [parent / "shared" / "data" / "cifar10-jpeg.tar.xz" for parent in parents]
    found = [path for path in candidates if path.exists()]
    if not found:
        pytest.skip("needs ../shared/data/cifar10-jpeg.tar.xz beside the repository")
    dataset = load(found[0])
    assert dataset.train_inputs.shape == (50_000, 3, 32, 32)
    assert dataset.test_inputs.shape == (10_000, 3, 32, 32)
    assert torch.bincount(dataset.train_targets).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_targets).tolist() == [1000] * 10
    assert dataset.note == "JPEG images: lossy"
    # The widely used means of the original; JPEG changes a mean colour little.
    assert torch.allclose(dataset.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-3)
    batches = Batches(dataset, 128, seed=0)
    assert (batches.per_epoch, batches.size(390)) == (391, 80)
    assert batches.inputs(390).shape == (80, 3, 32, 32)
