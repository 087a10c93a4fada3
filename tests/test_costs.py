"""Costs: defaults, broadcasting, and errors that say what to do."""

import math

import pytest

from ddg_sim.costs import Costs, costs
from ddg_sim.dependencies import Relation
from ddg_sim.schedule import OpKind


def test_defaults():
    two = Costs(forward=(1.0, 2.0), backward=(3.0, 4.0))
    assert two.num_stages == 2
    assert two.update == two.overhead == (0.0, 0.0)
    assert two.recompute == (1.0, 2.0)
    assert two.activation_transfer == two.gradient_transfer == (0.0,)


def test_numbers_stand_for_all_stages_and_links():
    found = costs(3, forward=1, backward=(2, 3, 4), comm=0.5, gradient_transfer=(0.1, 0.2))
    assert found.forward == (1.0, 1.0, 1.0)
    assert found.backward == (2.0, 3.0, 4.0)
    assert found.activation_transfer == (0.5, 0.5)
    assert found.gradient_transfer == (0.1, 0.2)
    assert costs(1, comm=3.0).activation_transfer == ()
    assert costs(2) == Costs(forward=(1.0, 1.0), backward=(2.0, 2.0))


def test_iterators_are_read_once():
    assert costs(2, forward=iter([1.0, 2.0])).forward == (1.0, 2.0)


def test_durations_include_the_overhead():
    found = costs(2, 1.0, 2.0, 0.5, recompute=1.5, overhead=(0.0, 0.25))
    assert found.duration(OpKind.FORWARD, 1) == 1.25
    assert found.duration(OpKind.BACKWARD, 0) == 2.0
    assert found.duration(OpKind.UPDATE, 1) == 0.75
    assert found.duration(OpKind.RECOMPUTE, 1) == 1.75
    halves = [found.duration(kind, 0) for kind in (OpKind.BACKWARD_INPUT, OpKind.BACKWARD_WEIGHT)]
    assert halves == [1.0, 1.0]
    assert found.duration(OpKind.ALL_REDUCE, 1) == 0.25


def test_links_join_a_stage_and_the_next():
    found = costs(3, activation_transfer=(1, 2), gradient_transfer=(3, 4))
    assert found.transfer(Relation.ACTIVATION, 1, 2) == 2.0
    assert found.transfer(Relation.GRADIENT, 1, 0) == 3.0
    assert found.transfer(Relation.CREDIT, 1, 0) == 0.0  # carries no data
    for relation, source, target in [
        (Relation.ACTIVATION, 1, 0),
        (Relation.GRADIENT, 0, 1),
        (Relation.ACTIVATION, 0, 2),
    ]:
        with pytest.raises(ValueError, match=f"no {relation.value} flows from stage {source}"):
            found.transfer(relation, source, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": (1.0,)}, r"forward has 1 value, but there are 2 stages \(K=2\): give one per"),
        ({"update": (1, 2, 3)}, "update has 3 values, but there are 2 stages"),
        ({"forward": ()}, "forward has 0 values, but there are 2 stages"),
        ({"comm": (1, 2)}, r"comm has 2 values, but there is 1 link \(K=2\): give one per link"),
        ({"gradient_transfer": ()}, "gradient_transfer has 0 values, but there is 1 link"),
        ({"backward": -1.0}, "backward is -1.0: give a finite number of seconds that is at least"),
        ({"backward": (1, math.nan)}, r"backward\[1\] is nan: give a finite"),
        ({"overhead": math.inf}, "overhead is inf: give a finite"),
        ({"comm": -0.5}, "comm is -0.5"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        costs(2, **arguments)


def test_errors_of_the_class():
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        costs(0)
    with pytest.raises(ValueError, match="forward is empty: give the seconds of at least one"):
        Costs(forward=(), backward=())
    with pytest.raises(ValueError, match="backward has 0 values, but there is 1 stage "):
        Costs(forward=(1.0,), backward=())
    with pytest.raises(ValueError, match="comm is nan"):
        costs(1, comm=math.nan)  # although one stage has no link


def test_costs_that_would_overflow_are_refused():
    with pytest.raises(ValueError, match=r"forward\[1\] is 1e\+308: give at most 1e\+12 seconds"):
        Costs(forward=(1.0, 1e308), backward=(1.0, 1.0))
    assert costs(2, forward=1e12).forward == (1e12, 1e12)
