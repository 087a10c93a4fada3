"""Fast elementary functions against the C library's at 80 bits, and what their error does."""

import numpy as np
import pytest

from theory import reversible, rotation
from theory.elementary import SATURATED, cos_sin, tanh
from theory.problems import make

EXACT = np.longdouble
precise = pytest.mark.skipif(
    np.finfo(EXACT).eps > 1e-18, reason="long double has no more digits than double here"
)


@precise
@pytest.mark.parametrize(
    ("smallest", "largest", "error"),
    [(1e-12, 0.1, 2.3e-16), (0.1, 3.0, 3.5e-16), (3.0, 700.0, 3.5e-16)],
)
def test_tanh(smallest, largest, error):
    size = np.geomspace(smallest, largest, 200_000)
    z = np.concatenate((size, -size))
    assert np.abs(tanh(z).astype(EXACT) - np.tanh(z.astype(EXACT))).max() <= error


@precise
def test_cosines_and_sines():
    far = np.linspace(-1e6, 1e6, 200_001)
    turns = np.pi * np.arange(-40, 41)[:, None] + np.linspace(-1e-6, 1e-6, 1001)
    angle = np.concatenate((np.linspace(-20.0, 20.0, 200_001), far, turns.ravel()))
    for found, exact in zip(cos_sin(angle), (np.cos, np.sin), strict=True):
        assert np.abs(found.astype(EXACT) - exact(angle.astype(EXACT))).max() <= 4e-16


def test_where_tanh_ends():
    assert tanh(np.array([SATURATED, 1e308, np.inf, -np.inf])).tolist() == [1.0, 1.0, 1.0, -1.0]
    assert np.isnan(tanh(np.array([np.nan]))).all()


@pytest.mark.parametrize("stages", [1, 8, 40])
@pytest.mark.parametrize("name", ["rotation-chain", "reversible-chain"])
def test_chains_lose_no_digits_that_count(name, stages, monkeypatch):
    chain, rng = make(name, stages), np.random.default_rng(0)
    w, sample = chain.start + 2.0 * rng.standard_normal((300, stages)), rng.integers(0, 2, 300)
    fast = chain.gradients(w, sample)
    for module in (rotation, reversible):
        monkeypatch.setattr(module, "tanh", np.tanh)
    exact = chain.gradients(w, sample)
    assert not np.array_equal(fast, exact)  # it was another function
    np.testing.assert_allclose(fast, exact, atol=5e-16, rtol=0)
