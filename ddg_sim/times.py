"""Times that vary: distributions of seconds, drawn by inverting their distribution function.

A time is a number or one of these. All are drawn from uniform numbers that belong to what is timed
(this operation of this stage on this sample), not to who asks first: methods that are compared meet
the same luck (common random numbers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


class Distribution(Protocol):
    """Non-negative seconds (or factors) that vary from draw to draw."""

    @property
    def mean(self) -> float:
        """Expected value."""

    def quantile(self, u: Array) -> Array:
        """The values below which fractions ``u`` in [0, 1) of all draws lie, of u's shape."""

    def scaled(self, factor: float) -> Distribution:
        """The distribution of ``factor`` times a draw."""


Time = float | Distribution


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution of this centre and width, cut off at 0 (Robert 1995).

    >>> Normal(10.0, 1.0).mean, round(float(Normal(1.0, 1.0).mean), 6)
    (10.0, 1.2876)
    """

    centre: float
    std: float

    def __post_init__(self) -> None:
        _check_moments("normal", "centre", self.centre, self.std)

    @property
    def mean(self) -> float:
        """Expected value; a little above the centre where much is cut off."""
        if not self.std:
            return self.centre
        cut = self.centre / self.std
        density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
        return self.centre + self.std * density / float(special.ndtr(cut))

    def quantile(self, u: Array) -> Array:
        """Inverse of the distribution function."""
        if not self.std:
            return np.full_like(u, self.centre)
        below = special.ndtr(-self.centre / self.std)
        z = special.ndtri(below + u * (1 - below))
        return np.asarray(np.maximum(0.0, self.centre + self.std * z))

    def scaled(self, factor: float) -> Normal:
        """Centre and width times ``factor``."""
        return Normal(self.centre * factor, self.std * factor)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal distribution, by its own mean and standard deviation (not the logarithm's).

    >>> draws = LogNormal(2.0, 0.5).quantile((np.arange(100_000) + 0.5) / 100_000)
    >>> round(float(draws.mean()), 3), round(float(draws.std()), 3)
    (2.0, 0.5)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        _check_moments("lognormal", "mean", self.mean, self.std)

    def quantile(self, u: Array) -> Array:
        """Inverse of the distribution function."""
        if not self.std:
            return np.full_like(u, self.mean)
        width = math.sqrt(math.log1p((self.std / self.mean) ** 2))
        scale = self.mean / math.exp(width**2 / 2)
        found: Array = special.ndtri(u)  # in place from here on: these arrays are large
        found *= width
        np.exp(found, out=found)
        found *= scale
        return found

    def scaled(self, factor: float) -> LogNormal:
        """Mean and standard deviation times ``factor``."""
        return LogNormal(self.mean * factor, self.std * factor)


@dataclass(frozen=True, slots=True)
class Gamma:
    """A gamma distribution, by its mean and standard deviation; std = mean is the exponential.

    >>> round(float(Gamma(1.0, 1.0).quantile(np.array([0.5]))[0]), 6)  # median of an exponential
    0.693147
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        _check_moments("gamma", "mean", self.mean, self.std)

    def quantile(self, u: Array) -> Array:
        """Inverse of the distribution function."""
        if not self.std:
            return np.full_like(u, self.mean)
        shape = (self.mean / self.std) ** 2
        return np.asarray(special.gammaincinv(shape, u) * (self.mean / shape))

    def scaled(self, factor: float) -> Gamma:
        """Mean and standard deviation times ``factor``."""
        return Gamma(self.mean * factor, self.std * factor)


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured values; each is drawn equally often.

    >>> Samples((3.0, 1.0)).quantile(np.array([0.0, 0.49, 0.5, 0.99])).tolist()
    [1.0, 1.0, 3.0, 3.0]
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("samples has no values: give at least one number of seconds")
        for value in self.values:
            check_number("a value of samples", value)
        object.__setattr__(self, "values", tuple(sorted(map(float, self.values))))

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return math.fsum(self.values) / len(self.values)

    def quantile(self, u: Array) -> Array:
        """The values, in order."""
        places = np.minimum((u * len(self.values)).astype(int), len(self.values) - 1)
        return np.asarray(np.array(self.values)[places])

    def scaled(self, factor: float) -> Samples:
        """All values times ``factor``."""
        return Samples(tuple(value * factor for value in self.values))


@dataclass(frozen=True, slots=True)
class Straggler:
    """A factor: 1 mostly, ``factor`` with the given probability.

    >>> Straggler(0.25, 3.0).mean, Straggler(0.25, 3.0).quantile(np.array([0.5, 0.8])).tolist()
    (1.5, [1.0, 3.0])
    """

    probability: float
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"straggler: probability is {self.probability}: give 0 to 1")
        check_number("straggler: factor", self.factor)

    @property
    def mean(self) -> float:
        """Expected factor."""
        return 1 + self.probability * (self.factor - 1)

    def quantile(self, u: Array) -> Array:
        """Where ``u`` falls into the last part, ``factor``."""
        return np.where(u >= 1 - self.probability, self.factor, 1.0)

    def scaled(self, factor: float) -> Distribution:
        """Not needed: a straggler multiplies times, and is no time itself."""
        raise ValueError("a straggler is a factor, not a time: give it as jitter or slowdown")


def mean(time: Time) -> float:
    """Expected value of a time.

    >>> mean(2.0), mean(Gamma(3.0, 1.0))
    (2.0, 3.0)
    """
    return float(time) if isinstance(time, int | float) else time.mean


def scaled(time: Time, factor: float) -> Time:
    """A time that takes ``factor`` times as long.

    >>> scaled(2.0, 1.5), scaled(Gamma(2.0, 1.0), 1.5)
    (3.0, Gamma(mean=3.0, std=1.5))
    """
    return time * factor if isinstance(time, int | float) else time.scaled(factor)


SHAPES: dict[str, Callable[[float, float], Distribution]] = {
    "normal": Normal,
    "lognormal": LogNormal,
    "gamma": Gamma,
    "straggler": Straggler,
}
_CALL = re.compile(r"\s*(?P<name>[a-z]+)\s*\(\s*(?P<numbers>[^()]*)\)\s*")


def parse_time(text: str) -> Time:
    """Read ``0.5``, ``normal(1, 0.1)``, ``lognormal(…)``, ``gamma(mean, std)``, ``samples(1, 2)``.

    Raises:
        ValueError: saying what was expected.

    >>> parse_time("0.5"), parse_time("gamma(1, 0.2)")
    (0.5, Gamma(mean=1.0, std=0.2))
    """
    call = _CALL.fullmatch(text)
    try:
        if call is None:
            return float(text)
        numbers = tuple(float(number) for number in call["numbers"].split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no time: give a number, or {', '.join(_forms())}") from None
    if call["name"] == "samples":
        return Samples(numbers)
    if call["name"] not in SHAPES or len(numbers) != 2:
        raise ValueError(f"{text!r} is no time: give a number, or {', '.join(_forms())}")
    return SHAPES[call["name"]](*numbers)


def _forms() -> list[str]:
    return [
        "normal(centre,std)",
        "lognormal(mean,std)",
        "gamma(mean,std)",
        "samples(a,b,…)",
        "straggler(probability,factor)",
    ]


def check_number(name: str, value: float) -> None:
    """Check a number of seconds (or a factor).

    Raises:
        ValueError: if it is negative, not finite or absurdly large; names it.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}: give a finite number of seconds that is at least 0")
    if value > MAX_SECONDS:
        raise ValueError(f"{name} is {value}: give at most {MAX_SECONDS:g} seconds")


#: Standard deviations up to so many means are taken.
WIDEST = 1000.0
MAX_SECONDS = 1e12  # 30 000 years; sums of much larger numbers would overflow


def _check_moments(shape: str, first: str, value: float, std: float) -> None:
    check_number(f"{shape}: {first}", value)
    check_number(f"{shape}: std", std)
    if value == 0 and std > 0:
        raise ValueError(f"{shape}: {first} is 0 while std is {std}: give a {first} above 0")
    if std > WIDEST * value:
        raise ValueError(
            f"{shape}: std is {std}, more than {WIDEST:g} times the {first} {value}: no number of"
            " runs would show its mean"
        )
