"""Texts for language models: windows of characters, each with the characters that follow.

`stories` needs no file and no network: small accounts of who gives what to whom. Their spelling
and grammar can be learned from frequencies, what is kept only by looking back and subtracting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddg_gpu.archive import DataError

Tokens = npt.NDArray[np.int64]

LENGTH = 64  # characters of an example
_NAMES = ("anna", "boris", "carla", "dmitri", "elena", "farid", "greta", "hugo")
_THINGS = ("apple", "book", "coin", "drum", "egg", "feather", "glove", "hat")
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_OWNED = range(2, len(_NUMBERS))
_TRAIN_STORIES, _TEST_STORIES = 5000, 500
_TEST_PART = 10  # the last one in ten of a file's characters


@dataclass(frozen=True, eq=False)
class Text:
    """Examples of a text: int64 arrays N x T, whose numbers are places in ``alphabet``.

    The target of a character is the one after it.
    """

    train_inputs: Tokens
    train_targets: Tokens
    test_inputs: Tokens
    test_targets: Tokens
    alphabet: str


def built_in() -> Text:
    """The stories that come with the toolkit; those of the test are drawn by another seed.

    >>> text = built_in()
    >>> text.train_inputs.shape, text.test_inputs.shape, len(text.alphabet)
    ((4510, 64), (451, 64), 26)
    """
    return _cut(stories(_TRAIN_STORIES, seed=0), stories(_TEST_STORIES, seed=1))


def read_text(path: Path) -> Text:
    """A file of UTF-8 text; its last tenth is for the test.

    Raises:
        DataError: naming the file, if it cannot be read or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{path}: cannot be read: {reason}") from None
    least = _TEST_PART * (LENGTH + 1)
    if len(text) < least:
        raise DataError(f"{path}: {len(text)} characters are too few, {least} are needed")
    split = len(text) - len(text) // _TEST_PART
    return _cut(text[:split], text[split:])


def stories(count: int, seed: int) -> str:
    """Return stories, a line each; a function of the two numbers.

    >>> print(stories(2, seed=0), end="")
    greta has four eggs, gives two to dmitri and keeps two.
    anna has three apples, gives three to boris and keeps none.
    """
    random = np.random.default_rng(seed)
    return "".join(_story(random) for _ in range(count))


def story_entropy() -> float:
    """Nats that a story is worth: no model's mean loss per character is less for long.

    It is this, divided by the characters of a mean story.

    >>> round(story_entropy() / (len(stories(1000, seed=2)) / 1000), 2)
    0.17
    """
    choices = len(_NAMES) * (len(_NAMES) - 1) * len(_THINGS) * len(_OWNED)
    return math.log(choices) + sum(map(math.log, _OWNED)) / len(_OWNED)


def _story(random: np.random.Generator) -> str:
    giver = int(random.integers(len(_NAMES)))
    taker = (giver + 1 + int(random.integers(len(_NAMES) - 1))) % len(_NAMES)
    thing = _THINGS[random.integers(len(_THINGS))]
    owned = int(random.integers(_OWNED.start, _OWNED.stop))
    given = int(random.integers(1, owned + 1))
    return (
        f"{_NAMES[giver]} has {_NUMBERS[owned]} {thing}s, gives {_NUMBERS[given]} to"
        f" {_NAMES[taker]} and keeps {_NUMBERS[owned - given]}.\n"
    )


def _cut(train: str, test: str) -> Text:
    alphabet = "".join(sorted({*train, *test}))
    return Text(*_windows(train, alphabet), *_windows(test, alphabet), alphabet)


def _windows(text: str, alphabet: str) -> tuple[Tokens, Tokens]:
    """Inputs and targets of all whole windows, which share no input."""
    number = {character: index for index, character in enumerate(alphabet)}
    tokens = np.array([number[character] for character in text], dtype=np.int64)
    count = (len(tokens) - 1) // LENGTH
    end = count * LENGTH
    return tokens[:end].reshape(count, LENGTH), tokens[1 : end + 1].reshape(count, LENGTH)
