"""Profiles and comparisons measured for real; what they say is checked, how fast it is is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddg_cli.validation import comparison_rows
from ddg_gpu.data import load
from ddg_gpu.job import Job
from ddg_gpu.plot import loss_curves
from ddg_gpu.profile import KEPT, measure, measured_cuts
from ddg_gpu.validate import Comparison, check_profile, compare, parse_method, speedups
from ddg_sim.costs import costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.methods import bp
from ddg_sim.profile import Profile, read


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
        assert len(factors) == 4
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
        parse_method("ddg/often")


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
