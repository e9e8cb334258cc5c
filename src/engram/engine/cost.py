"""What work has cost, trials that came to nothing included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass
class Cost:
    """`seconds` of wall time, optimiser `steps`, `rows` through a model (forward passes of single rows),
    and `flops` where they were counted (2 per multiply-add)."""

    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    flops: float = 0.0

    def add(self, other: Cost) -> None:
        """Take another cost into this one."""
        self.seconds += other.seconds
        self.steps += other.steps
        self.rows += other.rows
        self.flops += other.flops

    def since(self, earlier: Cost) -> Cost:
        """What came on top of an earlier state of this account."""
        return Cost(
            self.seconds - earlier.seconds,
            self.steps - earlier.steps,
            self.rows - earlier.rows,
            self.flops - earlier.flops,
        )

    @classmethod
    def of(cls, plain: dict[str, float]) -> Cost:
        """The account that `asdict` wrote down."""
        return cls(plain["seconds"], int(plain["steps"]), int(plain["rows"]), plain["flops"])

    def copy(self) -> Cost:
        """The present state."""
        return Cost(**asdict(self))

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the seconds of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
