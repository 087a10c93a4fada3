"""What is assumed about one GPU as K devices: the list of checks, in the order of their turns.

Each has its function in a module that loads torch; this one does not. None has met hardware yet.
"""

from __future__ import annotations

from ddg_gpu.isolated import Check

CHECKS = (
    Check("device", "is there a CUDA device", "ddg_gpu.cuda_device:device"),
    Check(
        "partitions",
        "can the multiprocessors be split, and do kernels stay on their part",
        "ddg_gpu.cuda_placement:partitions",
        "green-contexts",
        "none",
    ),
    Check(
        "graph partitions",
        "does a graph stay on the partition that it was captured on",
        "ddg_gpu.cuda_placement:graph_partitions",
        needs=("partitions",),
    ),
    Check(
        "concurrency",
        "do graphs on K partitions run at the same time",
        "ddg_gpu.cuda_costs:concurrency",
        needs=("partitions",),
    ),
    Check(
        "interference",
        "how long does work on a partition take alone and beside others",
        "ddg_gpu.cuda_costs:interference",
        "measured",
        "unknown",
        needs=("partitions",),
    ),
    Check(
        "transfers",
        "what does handing a tensor from one partition to another cost",
        "ddg_gpu.cuda_costs:transfers",
        "measured",
        "unknown",
        needs=("partitions",),
    ),
    Check(
        "graphs",
        "can a stage's forward and backward pass be captured, and what does launching cost",
        "ddg_gpu.cuda_steps:graphs",
    ),
    Check(
        "determinism",
        "does a captured step give the same bits again, and on another partition",
        "ddg_gpu.cuda_steps:determinism",
        "bits",
        "tolerance",
    ),
    Check(
        "streams",
        "do small kernels on two streams without partitions overlap",
        "ddg_gpu.cuda_costs:streams",
        "overlap",
        "serial",
    ),
)
