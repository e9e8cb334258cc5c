"""What work has cost, trials that came to nothing included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch.utils.flop_counter import FlopCounterMode


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

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Add the floating-point operations of the block, as `flops_of` counts them; what it costs by other accounts
        goes on as it is."""
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops += counter.get_total_flops()


def flops_of(act: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in `act()`, forward and backward.

    A multiply-add counts 2 (`torch.utils.flop_counter`); published figures often count it 1, those of NEVIS'22 among
    them. Solving and decomposing, norms and activations are not counted.
    """
    with FlopCounterMode(display=False) as counter:
        act()
    return int(counter.get_total_flops())
