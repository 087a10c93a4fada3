"""Random images of CIFAR's size, for timings that must not depend on data at hand."""

from __future__ import annotations

import torch

from ddg_gpu.data import Dataset


def random_images(count: int = 2000, seed: int = 0) -> Dataset:
    """Uniform noise, 3x32x32, 10 classes, augmented like CIFAR-10: the same work, no meaning."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 10, (count,), generator=generator)
    return Dataset(
        train_inputs=images,
        train_targets=targets,
        test_inputs=images[:200],
        test_targets=targets[:200],
        classes=10,
        mean=torch.full((3,), 0.5),
        std=torch.full((3,), 0.29),
        scale=255.0,
        augment=True,
        name="random images",
        note="random labels: an accuracy on them means nothing",
    )
