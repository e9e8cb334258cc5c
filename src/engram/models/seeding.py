"""Building modules reproducibly: torch's layers draw their initial weights from the global generator only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Inside the block torch's global generators follow `generator`; after it, they are where they were before.

    One number is drawn from `generator`. Those of CUDA devices, which dropout reads there, follow once CUDA is in use.
    What is built inside should be built on the CPU, so that it is the same everywhere.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
