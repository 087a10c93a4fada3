"""Cluster files: units, names, links, placement; one clear line for whatever is wrong."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddg_sim.cluster import (
    BYTES,
    DURATIONS,
    RATES,
    Cluster,
    ClusterError,
    quantity,
    read,
)
from ddg_sim.methods import bp, data_parallel, ddg, dp, interleaved
from ddg_sim.network import Sharing
from ddg_sim.placement import TooFewDevicesError, place

GB = 1e9
TWO_KINDS = [
    {"name": "fast", "count": 2, "speed": 2.0, "memory": "40 GB"},
    {"name": "slow", "count": 2, "memory": "16 GiB"},
]
LINK = {"bandwidth": "8 Gbit/s", "latency": "5 us"}


def cluster(**fields: Any) -> Cluster:
    return Cluster.model_validate({"version": 1, "devices": TWO_KINDS, **fields})


# --- The file -----------------------------------------------------------------------------------


def test_units_are_what_they_say():
    assert quantity("16 GB", BYTES, "") == 16e9
    assert quantity("16GiB", BYTES, "") == 16 * 2**30
    assert quantity("100 Gbit/s", RATES, "") == 12.5e9
    assert quantity("12 GB/s", RATES, "") == 12e9
    assert quantity("1.5 KiB/s", RATES, "") == 1536
    assert quantity("2e3 us", DURATIONS, "") == pytest.approx(2e-3)
    assert quantity("5 µs", DURATIONS, "") == quantity("5 us", DURATIONS, "")


@given(
    st.floats(0.001, 1e6).map(lambda x: f"{x:.6f}"),
    st.sampled_from([(BYTES, unit) for unit in BYTES] + [(RATES, unit) for unit in RATES]),
    st.sampled_from(["", " ", "   "]),
)
def test_every_unit_scales_its_number(number: str, pair: tuple[dict[str, float], str], gap: str):
    units, unit = pair
    assert quantity(f"{number}{gap}{unit}", units, "") == float(number) * units[unit]


MISTAKES = {
    "bare number": (
        {"default_link": {"bandwidth": 12}},
        "default_link.bandwidth: has no unit: write",
    ),
    "bare text": (
        {"default_link": {"bandwidth": "12"}},
        "bandwidth: has no unit: write for example",
    ),
    "gigabits or gigabytes": (
        {"default_link": {"bandwidth": "12 Gb/s"}},
        "unit 'Gb/s' is unknown: write for example '12 GB/s' or '100 Gbit/s' (got '12 Gb/s')",
    ),
    "bytes are no rate": ({"default_link": {"bandwidth": "12 GB"}}, "unit 'GB' is unknown"),
    "no number": ({"default_link": {"bandwidth": "fast"}}, "is no quantity"),
    "negative": ({"default_link": {**LINK, "latency": "-5 us"}}, "latency: is no quantity"),
    "nothing": ({"default_link": {"bandwidth": "0 GB/s"}}, "greater than 0 (got 0.0)"),
    "infinite": ({"default_link": {"bandwidth": "1e999 GB/s"}}, "is too large"),
    "latency": (
        {"default_link": {**LINK, "latency": 5}},
        "latency: has no unit: write for example",
    ),
    "memory": ({"devices": [{"name": "a", "memory": 16}]}, "devices[0].memory: has no unit"),
    "speed": ({"devices": [{"name": "a", "speed": 0}]}, "devices[0].speed: "),
    "count": ({"devices": [{"name": "a", "count": 0}]}, "devices[0].count: "),
    "no devices": ({"devices": []}, "devices: "),
    "same name": ({"devices": [{"name": "a"}, {"name": "a"}]}, "'a' is used twice"),
    "same name in a group": (
        {"devices": [{"name": "a-0"}, {"name": "a", "count": 2}]},
        "device name 'a-0' is used twice",
    ),
    "unknown device": (
        {"links": [{"between": ["fast", "gpu7"], **LINK}]},
        "links[0].between: unknown device 'gpu7'; devices: fast (fast-0 to fast-1), slow (",
    ),
    "itself": ({"links": [{"between": ["fast-0", "fast-0"], **LINK}]}, "joins 'fast-0' to itself"),
    "unknown bus": (
        {"default_link": {**LINK, "bus": "pci"}},
        "default_link.bus: unknown bus 'pci'",
    ),
    "sharing": ({"buses": [{"name": "b", "sharing": "mine"}]}, "buses[0].sharing: "),
    "transfers": ({"transfers": "sometimes"}, "'overlapped' or 'blocking' (got 'sometimes')"),
    "version": ({"version": 2}, "version: input should be 1 (got 2)"),
    "unknown field": ({"bandwith": 1}, "bandwith: extra inputs are not permitted"),
    "host": ({"host": {"operation": 2e-5}}, "host.operation: has no unit"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_in_a_file_are_one_line(mistake: str, tmp_path):
    fields, expected = MISTAKES[mistake]
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"version": 1, "devices": TWO_KINDS, **fields}))
    with pytest.raises(ClusterError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_are_one_line(tmp_path):
    path = tmp_path / "cluster.json"
    for content, expected in ((b"{", "not valid JSON"), (b"\xff\x00", "not a text file")):
        path.write_bytes(content)
        with pytest.raises(ClusterError, match=expected):
            read(path)


# --- Links --------------------------------------------------------------------------------------


def test_the_later_link_counts_and_a_group_stands_for_its_devices():
    found = cluster(
        default_link={"bandwidth": "1 GB/s"},
        links=[
            {"between": ["fast", "fast"], "bandwidth": "100 GB/s"},
            {"between": ["slow", "fast"], "bandwidth": "10 GB/s"},
            {"between": ["slow-1", "fast-0"], "bandwidth": "20 GB/s"},
        ],
    )
    bandwidths = {(a, b): found.link(a, b).bandwidth / GB for a in range(4) for b in range(a)}
    assert bandwidths == {(1, 0): 100, (2, 0): 10, (2, 1): 10, (3, 0): 20, (3, 1): 10, (3, 2): 1}
    assert all(found.link(a, b) == found.link(b, a) for a, b in bandwidths)


def test_devices_that_nothing_joins_are_named():
    found = cluster(links=[{"between": ["fast", "fast"], **LINK}])
    with pytest.raises(ClusterError, match="no link joins 'fast-1' and 'slow-0': add one"):
        place(ddg(3), found)
    place(ddg(2), found)


# --- Placement ----------------------------------------------------------------------------------


def test_without_a_cluster_devices_are_equal_and_links_free():
    found = place(ddg(3))
    assert found.speeds == (1.0, 1.0, 1.0)
    assert found.capacities == (math.inf,) * 3
    assert (found.latency, found.bandwidth) == ((0.0, 0.0), (math.inf, math.inf))
    assert found.all_reduce_latency == found.all_reduce_rate == (0.0,) * 3


def test_replicas_take_devices_in_order_and_the_slowest_counts():
    found = place(data_parallel(ddg(2), 2), cluster(default_link=LINK))
    # Replica 0 is on fast-0 and fast-1, replica 1 on slow-0 and slow-1.
    assert found.speeds == (1.0, 1.0)
    assert found.capacities == (16 * 2**30,) * 2
    found = place(ddg(4), cluster(default_link=LINK))
    assert found.speeds == (2.0, 2.0, 1.0, 1.0)
    assert found.capacities == (40e9, 40e9, 16 * 2**30, 16 * 2**30)
    assert found.bandwidth == (GB, GB, GB)
    assert found.latency == pytest.approx((5e-6,) * 3)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_ring_all_reduce(replicas: int):
    found = place(dp(1, replicas), cluster(default_link=LINK))
    size = 3e9
    seconds = found.all_reduce_latency[0] + found.all_reduce_rate[0] * size
    expected = 2 * (replicas - 1) / replicas * size / 1e9 + 2 * (replicas - 1) * 5e-6
    assert seconds == pytest.approx(expected)


def test_the_ring_is_as_slow_as_its_slowest_link():
    slow = {"between": ["fast-0", "slow-1"], "bandwidth": "1 MB/s", "latency": "1 s"}
    found = place(dp(1, 4), cluster(default_link=LINK, links=[slow]))
    assert found.all_reduce_rate[0] == pytest.approx(2 * 3 / 4 / 1e6)
    assert found.all_reduce_latency == (6.0,)
    across = {"between": ["fast-0", "slow-0"], "bandwidth": "1 MB/s", "latency": "1 s"}
    assert place(dp(1, 4), cluster(default_link=LINK, links=[across])).all_reduce_latency[
        0
    ] == pytest.approx(6 * 5e-6)  # devices 0 and 2 are no neighbours in the ring


def test_links_of_a_ring_share_their_bus():
    bus = {"buses": [{"name": "pci", "sharing": "fair"}]}
    alone = place(dp(1, 4), cluster(default_link=LINK))
    shared = place(dp(1, 4), cluster(default_link={**LINK, "bus": "pci"}, **bus))
    assert shared.all_reduce_rate[0] == pytest.approx(4 * alone.all_reduce_rate[0])


def test_stages_on_one_device_need_no_link():
    found = place(dp(3, 1), cluster())
    assert (found.latency, found.bandwidth) == ((0.0, 0.0), (math.inf, math.inf))
    found = place(interleaved(4), cluster(default_link=LINK))  # stages 0, 2 and 1, 3
    assert len(found.speeds) == 2
    assert found.bandwidth == (GB, GB, GB)


def test_too_few_devices():
    with pytest.raises(TooFewDevicesError, match=r"5 devices .* but the cluster has 4"):
        place(bp(5), cluster(default_link=LINK))
    with pytest.raises(TooFewDevicesError, match=r"6 devices .*\(3 workers, 2 replicas\)"):
        place(data_parallel(bp(3), 2), cluster(default_link=LINK))


def test_buses_carry_both_directions_of_their_links():
    found = cluster(
        default_link=LINK,
        links=[{"between": ["fast", "fast"], **LINK, "bus": "pci"}],
        buses=[{"name": "pci", "sharing": "fifo"}, {"name": "idle", "sharing": "fair"}],
        transfers="blocking",
        queue_depth=3,
    )
    network = place(ddg(4), found).network
    assert network.blocking
    (bus,) = network.buses
    assert bus.links == {(0, 1), (1, 0)}
    assert bus.sharing is Sharing.FIFO
    assert place(ddg(4), found).queue == 3
    with pytest.raises(ClusterError, match="bus 'pci' would be shared by 2 replicas"):
        place(data_parallel(ddg(2), 2), found)
