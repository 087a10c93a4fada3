"""Published training times against what the simulator predicts for them.

The data are read where they lie; nothing of them is in this package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddg_sim.comparison import Anchor
from ddg_sim.ddg_anchors import resnet56_times, resnet110_times, wide_resnet_times
from ddg_sim.pipeline_anchors import pipedream_plans, torchgpipe, vtrain

#: Per file, what is compared with it.
ANCHORS: dict[str, tuple[Callable[[Path], Anchor], ...]] = {
    "ddg_wrn_resnet56.csv": (wide_resnet_times, resnet56_times),
    "ddg_resnet110_cifar10.csv": (resnet110_times,),
    "vtrain_a100_single_node.csv": (vtrain,),
    "torchgpipe_resnet101.csv": (torchgpipe,),
    "pipedream_optimizer.csv": (pipedream_plans,),
}


def compare(folder: Path) -> tuple[tuple[Anchor, ...], tuple[str, ...]]:
    """Compare every published data set in a folder with the simulator's predictions.

    Args:
        folder: with files as `ANCHORS` names them.

    Returns:
        What was compared, and the names of the files that the folder lacks.

    Raises:
        ValueError: if the folder does not exist, or a file's contents are not what is expected.

    >>> compare(Path("no/such/folder"))
    Traceback (most recent call last):
    ...
    ValueError: no/such/folder: is no folder; give the one with the published measurements
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; give the one with the published measurements")
    found: list[Anchor] = []
    missing: list[str] = []
    for name, comparisons in ANCHORS.items():
        path = folder / name
        if path.is_file():
            found += [compare(path) for compare in comparisons]
        else:
            missing.append(name)
    return tuple(found), tuple(missing)
