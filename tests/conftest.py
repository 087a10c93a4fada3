"""Settings that every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and the commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tables are as wide as this says; tests that want a width set it.
os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, and on a busy machine they wait on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
