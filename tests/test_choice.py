"""A method with its options in one word: what it means, and one line for what is wrong."""

import pytest

from ddg_sim.choice import parse_choice
from ddg_sim.methods import METHODS, Semantics, adl, ddg, dsp, gpipe, pipelined_backprop
from ddg_sim.schedule import Sync


@pytest.mark.parametrize(
    ("text", "stages", "expected"),
    [
        ("ddg", 3, ddg(3)),
        ("ddg/barrier", 3, ddg(3, Sync.BARRIER)),
        ("ddg/none:semantics=replay", 3, ddg(3, semantics=Semantics.REPLAY)),
        ("ddg:delays=3-1-0", 3, ddg(3, delays=(3, 1, 0))),
        ("gpipe:micro_batches=4:replay", 2, gpipe(2, 4, replay=True)),
        ("gpipe:replay=false", 2, gpipe(2)),
        ("adl:accumulate=4", 2, adl(2, 4)),
        ("dsp:lags=1-0:delays=3-0", 2, dsp(2, (1, 0), (3, 0))),
        ("pb:spike:predict=true", 2, pipelined_backprop(2, spike=True, predict=True)),
    ],
)
def test_a_choice_is_a_schedule(text, stages, expected):
    assert parse_choice(text).schedule(stages) == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_name_alone_is_a_choice(name):
    assert parse_choice(name).schedule(2) == METHODS[name](2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dgd", "unknown method 'dgd'"),
        ("", "unknown method ''"),
        ("ddg/often", "method 'ddg/often': unknown sync 'often'; known: none, barrier, mailbox"),
        ("ddg/", "unknown sync ''"),
        ("ddg:semantics=new", "unknown semantics 'new'; known: stash, current, replay"),
        ("ddg:delay=1", "'delay' is no option; options: semantics, delays"),
        ("bp:replay", "'replay' is no option; options: none"),
        ("gpipe:micro_batches", "micro_batches needs a value"),
        ("gpipe:micro_batches=", "micro_batches needs a value"),
        ("gpipe:micro_batches=2.5", "micro_batches must be a number, got '2.5'"),
        ("gpipe:micro_batches=4000", "micro_batches must be at most 1024, got 4000"),
        ("gpipe:replay=maybe", "replay must be true or false, got 'maybe'"),
        ("gpipe:replay:replay", "replay is given twice"),
        ("dsp:lags=1-x", "lags must be numbers such as 2-1-0, got 'x'"),
        ("fdg:shrink=nan", "shrink must be finite, got nan"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(ValueError, match="^(unknown )?method") as caught:
        parse_choice(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["gpipe:micro_batches=0", "adl:accumulate=-1", "ddg:delays=1"])
def test_values_that_the_method_refuses(text):
    with pytest.raises(ValueError, match=r"at least 1|must be 3 numbers"):
        parse_choice(text).schedule(3)


def test_synchronisation_that_the_method_lacks():
    with pytest.raises(ValueError, match="sync 'barrier' does not apply to gpipe"):
        parse_choice("gpipe/barrier").schedule(2)
