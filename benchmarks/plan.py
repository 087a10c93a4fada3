"""Seconds of a large plan, on free links and on two nodes whose links take time.

    python benchmarks/plan.py

The network is made up: a convolutional one of 120 layers, of which the first have large outputs and
the last most of the parameters. ``--profile`` takes another, in any format that ``ddg plan`` reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from environment import environment

LAYERS, BATCH = 120, 64
CLUSTERS = {"free links": 0, "8 GPUs": 8, "16 GPUs": 16}
SWEEPS = [  # options of one command each: ddg and fr know three synchronisations
    "--methods bp,gpipe,1f1b,pipedream,dgl",
    "--methods ddg,fr --sync none,barrier,mailbox",
]


def network() -> str:
    """A network as a PipeDream profile: milliseconds and bytes of a batch of 64."""
    lines = []
    for layer in range(LAYERS):
        depth = layer // 30  # every 30 layers the pictures shrink and the channels double
        forward = 1.5 + 1.2 * ((7 * layer) % 11) / 11
        outputs = BATCH * 4 * 400_000 / 2**depth
        weights = 4 * 9 * (64 * 2**depth) ** 2
        lines.append(
            f"node{layer} -- layer{layer} -- forward_compute_time={forward:.3f},"
            f" backward_compute_time={2 * forward:.3f}, activation_size={outputs:.1f},"
            f" parameter_size={weights:.1f}"
        )
    lines += [f"\tnode{layer} -- node{layer + 1}" for layer in range(LAYERS - 1)]
    return "\n".join(lines) + "\n"


def two_nodes(devices: int, memory: str) -> dict[str, object]:
    """Two equal nodes: fast links inside, slow ones between them."""
    inside = {"bandwidth": "100 GB/s", "latency": "5 us"}
    return {
        "version": 1,
        "devices": [{"name": node, "count": devices // 2, "memory": memory} for node in "ab"],
        "links": [{"between": [node, node], **inside} for node in "ab"],
        "default_link": {"bandwidth": "10 GB/s", "latency": "30 us"},
    }


def timed(words: list[str]) -> tuple[int, int, float]:
    """Points of a plan, those whose cuts were proved best, and its seconds."""
    start = perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "ddg_cli", "plan", "--json", *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    seconds = perf_counter() - start
    rows = json.loads(run.stdout)["rows"]
    proved = sum(row["period_lower_bound"] >= row["period"] * (1 - 1e-6) for row in rows)
    return len(rows), proved, seconds


def main() -> None:
    """Run the sweeps on every cluster and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", type=Path, default=None)
    parser.add_argument("--batches", type=int, default=60, help="how many sizes, 8 apart")
    parser.add_argument("--only", choices=CLUSTERS, default=None, help="one of the clusters")
    parser.add_argument("--memory", default="1 PB", help="of a device, as '80 GB'")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    sizes = ",".join(str(8 * (index + 1)) for index in range(options.batches))
    found = {}
    with TemporaryDirectory() as folder:
        layers = options.profile or Path(folder) / "network.graph.txt"
        if options.profile is None:
            layers.write_text(network())
        for name, devices in CLUSTERS.items():
            if options.only not in (None, name):
                continue
            words = ["--profile", str(layers), "--profile-batch-size", str(BATCH)]
            words += ["--stages", f"1..{devices or 16}", "--batch-sizes", sizes]
            words += ["--jobs", str(options.jobs)]
            if devices:
                cluster = Path(folder) / "cluster.json"
                cluster.write_text(json.dumps(two_nodes(devices, options.memory)))
                words += ["--cluster", str(cluster)]
            each = [timed([*words, *sweep.split()]) for sweep in SWEEPS]
            points, proved, seconds = map(sum, zip(*each, strict=True))
            found[name] = {"points": points, "proved": proved, "seconds": seconds}
            print(f"{name:12} {points:7,} points, {proved:7,} proved best {seconds:7.1f} s")
    if options.output is not None:
        result = {"environment": environment(), "measured": found}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
