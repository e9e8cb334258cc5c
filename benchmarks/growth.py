"""What every learner holds over 50 tasks, against what it declares: python -m benchmarks.growth [TASKS]."""

from __future__ import annotations

import sys

from engram import catalogue
from engram.compare.growth import IMAGES, OF_IMAGES, ROWS, SETTLED, TOLERANCE, excess, follow
from engram.core.settings import load_class, settings


def main(tasks: int = 50) -> None:
    """A line a learner: declared growth, bytes after some tasks, and how far they are from it."""
    print(f"bytes of all tensors that a learner holds; excess: residual after the first {SETTLED:.0%} of the tasks")
    shown = (1, tasks // 2, tasks)
    titles = "".join(f"after {k}".rjust(12) for k in shown)
    print(f"{'learner':<26} {'declared':<10} {titles} {'excess':>8}")
    for row in catalogue.methods():
        if row.wing != "keep":
            continue
        learner = load_class(row.name).tiny()  # type: ignore[attr-defined]
        if row.name == "keep.LingoCL":  # its own has names for ten classes
            learner = type(learner)(host=learner.host, encoder="random", width=32)
        if "buffer" in (own := settings(learner)):  # a row of every class at least
            learner = type(learner)(**{**own, "buffer": 4 * tasks})
        curve = follow(learner, tasks, inputs=IMAGES if row.name in OF_IMAGES else ROWS)
        found = excess(learner.growth, curve)
        sizes = "".join(f"{curve[k - 1].bytes:>12}" for k in shown)
        print(f"{row.name:<26} {learner.growth:<10} {sizes} {found:>8.2%} {'' if found <= TOLERANCE else 'TOO MUCH'}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
