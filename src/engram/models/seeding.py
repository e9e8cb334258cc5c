"""Building modules reproducibly: torch's layers draw their initial weights from the global generator only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Inside the block torch's global CPU generator follows `generator`; after it, it is where it was before.

    One number is drawn from `generator`. Only the CPU generator is touched: build on the CPU, then move.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield
