"""Profiles and comparisons measured for real; what they say is checked, how fast it is is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddg_cli.validation import comparison_rows
from ddg_gpu.data import load
from ddg_gpu.job import Job
from ddg_gpu.plot import loss_curves
from ddg_gpu.profile import KEPT, measure, measured_cuts
from ddg_gpu.validate import Comparison, check_profile, checked, compare, speedups
from ddg_sim.costs import costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.eventgraph import event_graph
from ddg_sim.methods import bp, ddg
from ddg_sim.profile import Profile, program_text, read
from ddg_sim.synchronous import gpipe


@pytest.fixture(scope="module")
def profile() -> Profile:
    return measure(Job("bp", 3, "resnet8", iterations=1, batch_size=16), load("digits"), 2)


def test_a_profile_describes_every_stage_and_link(profile: Profile) -> None:
    assert (profile.model, profile.data, profile.batch_size) == ("resnet8", "digits", 16)
    assert [len(stage.layers) for stage in profile.stages] == [
        right - left for left, right in zip([0, *profile.cuts], [*profile.cuts, 5], strict=True)
    ]
    for stage in profile.stages:
        assert min(stage.forward, stage.backward, stage.update, stage.recompute) > 0
        factors = [f for row in stage.contention.values() for f in row.values()]
        assert set(stage.contention) == {"forward", "backward", "update", "recompute"}
        assert all("wait" in stage.contention[kind] for kind in ("forward", "backward", "update"))
        assert min(factors) >= 1
        assert stage.parameter_bytes > 0
    assert [link.bytes for link in profile.links] == [s.output_bytes for s in profile.stages[:-1]]
    assert all(stage.message > 0 for stage in profile.stages)
    for stage in profile.stages:
        for kind, seconds in stage.samples.items():
            assert len(seconds) <= KEPT
            assert min(seconds) <= getattr(stage, kind) <= max(seconds)


def test_a_profile_survives_the_disk(profile: Profile, tmp_path: Path) -> None:
    profile.write(tmp_path / "profile.json")
    assert read(tmp_path / "profile.json") == profile


def test_given_cuts_are_kept() -> None:
    job = Job("bp", 2, "mlp", iterations=1, cuts=(1,))
    assert measure(job, load("digits"), 2).cuts == [1]


def test_measured_cuts_refuse_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="stages must be between 1 and the model's 8 layers"):
        measured_cuts(Job("bp", 9, "mlp", iterations=1), load("digits"), 1)


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    job = Job("bp", 2, "mlp", iterations=12, batch_size=32)
    _, found = compare(job, ["bp", "ddg/barrier", "ddg"], load("digits"), rounds=2)
    return found


def test_a_comparison_predicts_and_runs_the_same_schedule(comparisons: list[Comparison]) -> None:
    assert [item.name for item in comparisons] == ["bp", "ddg/barrier", "ddg"]
    for item in comparisons:
        assert item.predicted.schedule == item.run.timeline.schedule
        assert item.predicted.memory == item.run.timeline.memory
        assert item.error == pytest.approx(item.predicted_period / item.measured_period - 1)
        assert item.measured_period > 0
    barrier, free = comparisons[1:]
    assert barrier.run.weights_sha256 == free.run.weights_sha256
    assert comparisons[0].run.weights_sha256 != free.run.weights_sha256


def test_predictions_come_from_the_profile_alone(profile: Profile) -> None:
    steady = {"contention": 1.0, "samples": {}}
    stages = [stage.model_copy(update=steady) for stage in profile.stages]
    still = profile.model_copy(update={"stages": stages})
    _, (found,) = compare(
        Job("bp", 3, "resnet8", iterations=4, batch_size=16),
        ["bp"],
        load("digits"),
        profile=still,
        rounds=1,
    )
    expected = cycle_time(bp(3), still.costs()).period
    assert found.predicted_period == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp"}, "model is mlp, but the profile is of model resnet8"),
        ({"batch_size": 8}, "batch_size is 8"),
        ({"stages": 2}, "stages is 2, but the profile is of stages 3"),
        ({"cuts": (1, 4)}, r"cuts is \[1, 4\], but the profile is of cuts"),
    ],
)
def test_a_profile_of_something_else_is_refused(
    profile: Profile, changes: dict[str, object], message: str
) -> None:
    job = Job(
        **{"method": "bp", "stages": 3, "model": "resnet8", "batch_size": 16, **changes},
        iterations=1,
    )
    with pytest.raises(ValueError, match=message):
        check_profile(profile, job, "digits")


def test_a_profile_of_other_data_is_refused(profile: Profile) -> None:
    job = Job("bp", 3, "resnet8", iterations=1, batch_size=16)
    with pytest.raises(ValueError, match="data is cifar, but the profile is of data digits"):
        check_profile(profile, job, "cifar")


def test_methods_are_checked_before_anything_runs() -> None:
    job = Job("bp", 2, "mlp", iterations=1)
    with pytest.raises(ValueError, match="unknown method 'dgd'"):
        compare(job, ["bp", "dgd"], load("digits"))
    with pytest.raises(ValueError, match="unknown sync 'often'"):
        compare(job, ["bp", "ddg/often"], load("digits"))
    with pytest.raises(ValueError, match="train in one process only"):
        checked(job, "dp")


def test_a_profile_holds_what_a_rule_costs() -> None:
    """A program of its own for each, and the halves of a split pass with their share."""
    job = Job("bp", 2, "resnet8", iterations=1, batch_size=16)
    wanted = ("zb-h1", "fr", "dgl", "adl:accumulate=3", "interleaved")
    own = {name: checked(job, name) for name in wanted}
    found = measure(job, load("digits"), 4, methods=list(own.values()))
    schedules = {name: job.schedule() for name, job in own.items()}
    assert {program_text(schedule) for schedule in schedules.values()} == set(found.programs)
    halves = found.costs(schedules["zb-h1"])
    assert halves.input_share[0] < halves.input_share[1]  # nobody needs the gradient of the data
    for schedule in schedules.values():
        assert min(found.costs(schedule).forward) > 0
    assert found.costs(ddg(2)) == found.costs()  # not measured: backpropagation's


def test_options_of_methods_are_compared() -> None:
    job = Job("bp", 2, "mlp", iterations=6, batch_size=8)
    names = ["gpipe:micro_batches=3:replay", "adl:accumulate=2"]
    profile, found = compare(job, names, load("digits"), rounds=1, samples=4)
    assert [item.name for item in found] == names
    assert [item.samples for item in found] == [3, 2]
    assert found[0].run.job.schedule() == gpipe(2, 3, replay=True)
    assert program_text(gpipe(2, 3, replay=True)) in profile.programs


def test_workers_that_share_a_core_are_predicted_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction on one core is all the work there is."""
    monkeypatch.setattr("ddg_gpu.validate.available_cores", lambda: 1)
    job = Job("bp", 2, "mlp", iterations=8, batch_size=8)
    profile = measure(replace(job, cuts=(4,)), load("digits"), 2)
    profile = profile.model_copy(
        update={"stages": [stage.model_copy(update={"samples": {}}) for stage in profile.stages]}
    )
    _, (found,) = compare(job, ["ddg"], load("digits"), profile=profile, rounds=1)
    work = sum(event.seconds(profile.costs()) for event in event_graph(ddg(2)).events if event.node)
    assert found.predicted_period == pytest.approx(work, rel=0.1)
    assert found.bound_by.startswith("2 workers take turns on 1 core; ")


def test_speedups_need_a_baseline() -> None:
    assert speedups({"ddg": 1.0, "bp": 3.0}) == {"ddg": 3.0, "bp": 1.0}
    assert speedups({"ddg": 1.0}) == {"ddg": None}


def test_loss_curves_are_drawn(tmp_path: Path) -> None:
    loss_curves({"bp": ([2.0, 1.0, 0.5], 0.1), "ddg": ([2.0], 0.05)}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


def test_costs_of_one_stage_have_no_contention() -> None:
    found = measure(Job("bp", 1, "mlp", iterations=1), load("digits"), 2)
    assert (found.contention, found.links, found.cuts) == ([{}], [], [])
    assert found.costs().num_stages == costs(1).num_stages == 1


def test_speeds_are_compared_per_sample() -> None:
    """An iteration of four micro-batches that takes four times as long as bp's is as fast."""
    run = SimpleNamespace(test_accuracy=0.5, losses=(1.0,), weights_sha256="")
    found: list[Any] = [
        SimpleNamespace(
            name=name,
            samples=samples,
            predicted_period=2.0 * samples,
            measured_period=samples / 2,
            measured_interval=None,
            error=0.0,
            bound_by="",
            run=run,
        )
        for name, samples in (("bp", 1), ("gpipe", 4))
    ]
    row = comparison_rows(found)["gpipe"]
    assert row["predicted_speedup"] == row["measured_speedup"] == 1.0
    assert row["samples_per_iteration"] == 4
