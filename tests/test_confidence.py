import math

import numpy as np
import pytest

from theory.confidence import bets, compare, log_capital, lower_limit, refuted


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_coverage_on_bernoulli_streams_at_all_times(p):
    level, streams = 0.1, 600
    x = (np.random.default_rng(0).random((streams, 400)) < p).astype(float)
    missed = sum(refuted(stream, p, level) for stream in x)
    missed_above = sum(refuted(1 - stream, 1 - p, level) for stream in x)
    slack = 3 * math.sqrt(streams * level * (1 - level))
    assert max(missed, missed_above) <= streams * level + slack
    # And it can tell: half of the mean is refuted on most of the streams where there is much.
    assert np.mean([refuted(stream, p / 2, level) for stream in x]) > (0.9 if p > 0.1 else 0.02)


def test_peeking_bets_would_be_caught():
    # The same capital with bets that have seen the draw they are made on: far above the level.
    x = (np.random.default_rng(0).random((300, 400)) < 0.3).astype(float)
    peeking = [log_capital(s, np.where(s > 0.3, 0.5, 0.0), 0.3).max() for s in x]
    assert np.mean(np.array(peeking) >= math.log(10)) > 0.5


def test_the_first_bet_knows_nothing_and_no_bet_its_own_draw():
    rng = np.random.default_rng(0)
    x, y = rng.random(20), rng.random(20)
    y[:10] = x[:10]
    np.testing.assert_array_equal(bets(x, 0.01)[:11], bets(y, 0.01)[:11])
    assert bets(x, 0.01)[11] != bets(y, 0.01)[11]


def test_limits_are_where_the_refuted_means_end():
    x = np.random.default_rng(0).beta(2, 5, 300)
    limit = lower_limit(x, 1e-3)
    assert refuted(x, limit - 1e-9, 1e-3)
    assert not refuted(x, limit + 1e-9, 1e-3)
    assert 0.15 < limit < x.mean()
    # Closing in on the mean, at about 1/sqrt(t).
    more = np.random.default_rng(0).beta(2, 5, 30000)
    assert more.mean() - lower_limit(more, 1e-3) < 0.2 * (x.mean() - limit)


@pytest.mark.parametrize(("bound", "side"), [(0.6, "below"), (0.4, "above"), (0.5, "open")])
def test_compare_stops_when_it_knows(bound, side):
    rng = np.random.default_rng(0)
    found = compare(lambda count: rng.random(count), bound, alpha=1e-3, most=4000)
    assert (found.upper < bound, found.lower > bound) == (side == "below", side == "above")
    assert (found.draws == 4000) == (side == "open")
    assert found.lower < 0.5 < found.upper


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"draws must lie in \[0, 1\], got .* to 2.0"):
        compare(lambda count: np.full(count, 2.0), 0.5, 0.01, 10)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 0"):
        compare(np.zeros, 0.5, 0, 10)
    with pytest.raises(ValueError, match="number of paths must be at least 1, got 0"):
        compare(np.zeros, 0.5, 0.1, 0)
