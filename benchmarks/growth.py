"""What every learner holds over 50 tasks, against what it declares: python -m benchmarks.growth --out PAGE.

With --learners, those alone, and no page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.tables.common import by_hand, page, said, write
from engram import catalogue
from engram.compare.growth import IMAGES, OF_IMAGES, ROWS, SETTLED, excess, follow, shown, small

TABLE = "Learners"
INTRO = """Every learner, in a small setting, takes in {tasks} tasks of one to three new classes and 6 to 20 generated
rows a class: first two classes at a time, then one, then three; few rows, then many, then few. The bytes are those of
all tensors in its state: the model, and whatever else it keeps. A learner declares what they depend on ("declares").
"Shows" is the growth of fewest terms that explains the curve, once {settled:.0f} % of the tasks have passed and buffers
are full, and no other by more than a hundredth of the bytes at the end closer; "off" is the largest residual of that
fit, as a share of the bytes at the end. What has bounds is left to the fit: rows in buffers of a fixed size ({buffer}
here), whose equal shares for all classes round down, and the number of classes that came last."""


def main() -> None:
    """Measure and write the page; what was written by hand stays."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--learners", nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    wanted = {f"keep.{name}" for name in given.learners}
    names = [row.name for row in catalogue.methods() if row.wing == "keep" and (not wanted or row.name in wanted)]
    columns = ("learner", "declares", "shows", *(f"after {k}" for k in _points(given.tasks)), "off")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---:|---:|---:|---:|"]
    for name in names:
        lines.append(line(name, given.tasks))
        print(lines[-1], flush=True)
    if given.out and not wanted:
        intro = INTRO.format(tasks=given.tasks, settled=100 * SETTLED, buffer=4 * given.tasks)
        parts = [intro, f"## {TABLE}\n\n" + "\n".join(lines), *by_hand(given.out, [TABLE]).values()]
        write(given.out, page(f"What learners hold over {given.tasks} tasks", "\n\n".join(parts), said()))


def line(name: str, tasks: int) -> str:
    """A learner's row: declared growth, shown growth, bytes after some tasks, and how far they are from it."""
    learner = small(name, tasks)
    curve = follow(learner, tasks, inputs=IMAGES if name in OF_IMAGES else ROWS)
    found = shown(curve)
    off = excess(learner.growth, curve)
    says = found if found == learner.growth else f"**{found}**"
    sizes = " | ".join(f"{curve[k - 1].bytes:,}" for k in _points(tasks))
    return f"| `{name}` | {learner.growth} | {says} | {sizes} | {off:.2%} |".replace("%", " %")


def _points(tasks: int) -> tuple[int, int, int]:
    return 1, tasks // 2, tasks


if __name__ == "__main__":
    main()
