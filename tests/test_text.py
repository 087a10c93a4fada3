"""Texts: windows of characters, the built-in stories, and files."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from ddg_gpu.data import Batches, DataError, load
from ddg_gpu.text import LENGTH, built_in, read_text, stories, story_entropy


def test_windows_are_the_text_and_targets_are_one_character_later(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 23) for i in range(2000))
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    found = read_text(tmp_path / "x.txt")
    train, test = text[:1800], text[1800:]
    for part, inputs, targets in (
        (train, found.train_inputs, found.train_targets),
        (test, found.test_inputs, found.test_targets),
    ):
        count = (len(part) - 1) // LENGTH
        spelt = ["".join(found.alphabet[i] for i in rows.ravel()) for rows in (inputs, targets)]
        assert spelt == [part[: count * LENGTH], part[1 : count * LENGTH + 1]]


def test_a_story_keeps_its_books_and_its_entropy_is_that_of_its_draws() -> None:
    pattern = r"(\w+) has (\w+) (\w+)s, gives (\w+) to (\w+) and keeps (\w+)\."
    words = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = stories(20000, seed=3).splitlines()
    drawn: list[Counter[str]] = [Counter() for _ in range(6)]
    kept_given = 0.0
    for line in lines:
        match = re.fullmatch(pattern, line)
        assert match is not None
        giver, owned, thing, given, taker, kept = match.groups()
        assert giver != taker
        assert words.index(owned) == words.index(given) + words.index(kept)
        kept_given += math.log(words.index(owned))
        for counter, word in zip(drawn, match.groups(), strict=True):
            counter[word] += 1

    def entropy(counter: Counter[str]) -> float:
        return -sum(n / len(lines) * math.log(n / len(lines)) for n in counter.values())

    # The taker is one of the others: a name's entropy less what the giver tells.
    others = math.log(7)
    measured = sum(entropy(drawn[i]) for i in (0, 1, 2)) + others + kept_given / len(lines)
    assert measured == pytest.approx(story_entropy(), abs=0.01)


def test_the_stories_are_the_same_everywhere() -> None:
    """Golden: a drawn number that changes with a library changes every result."""
    text = built_in()
    assert text.alphabet == "\n ,.abcdefghiklmnoprstuvwx"
    assert int((text.train_inputs * (1 + text.train_targets)).sum()) == 35496120


def test_mini_batches_of_a_text_are_tokens() -> None:
    dataset = load("text")
    batches = Batches(dataset, batch_size=32, seed=1)
    inputs, targets = batches.inputs(3), batches.targets(3)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (32, LENGTH)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert dataset.input_shape == (LENGTH,)
    assert dataset.classes == int(dataset.train_inputs.max()) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff" * 1000, "not UTF-8 text"),
        (b"short", "5 characters are too few, 650 are needed"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"mine\.txt: .*{message}"):
        load(path)
