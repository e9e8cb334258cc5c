"""Head-only learners on frozen features: NMC, FeTrIL, ACU, and the joint head, over three class orders."""

from __future__ import annotations

import torch

from benchmarks.tables.common import (
    arguments,
    as_cifar,
    backbone,
    course,
    head,
    images,
    page,
    row,
    said,
    settings,
    with_features,
    write,
)
from engram.core.learner import Learner, fresh
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.keep.acu import ACU
from engram.keep.fetril import FeTrIL
from engram.keep.joint import JointHead
from engram.keep.nmc import NMC

SEEDS = (1993, 1994, 1995)
LEARNERS: dict[str, Learner] = {
    "NMC": NMC(),
    "FeTrIL": FeTrIL(),
    "ACU": ACU(size=1000),
    "joint head": JointHead(),
}
INTRO = """Features: average pool (64 numbers) of the ResNet-56 trained on CIFAR-10, never trained further. Class
orders: the permutation of `RandomState(seed)` for seeds 1993, 1994, 1995. Figures are percent: mean ± half of the 95
% t interval over the three orders. "Task mean" averages over tasks, "sample mean" over test rows. The joint head
keeps the features of all rows and is the upper bound of a linear head; the other three keep no row. ACU may lie above
it, since it expands the 64 features to 1,000 random ones. Over all test rows, NMC and the joint head end the same in
every class order. Streams are (classes of the first task, classes of each further one, number of tasks)."""


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    given = arguments(__doc__).parse_args()
    model = backbone(given.data, 56)
    parts = [INTRO]
    fashion = [with_features(as_cifar(t), model, given.cache) for t in images(given.data / "fashion_mnist")]
    parts.append(_table("Fashion-MNIST (padded to 32, grey repeated), (2, 2, 5)", fashion, 2, 2))
    cifar = [with_features(t, model, given.cache) for t in images(given.data / "cifar100")]
    for base, increment in ((20, 20), (50, 10)):
        count = (100 - base) // increment + 1
        parts.append(_table(f"CIFAR-100, ({base}, {increment}, {count})", cifar, base, increment))
    parts.append(f"## Settings\n\n{settings(LEARNERS)}")
    write(given.out, page("Head-only learners on frozen features", "\n\n".join(parts), said()))


def _table(title: str, tables: list[Table], base: int, increment: int) -> str:
    train, test = tables
    lines = []
    for name, learner in LEARNERS.items():
        found = []
        for seed in SEEDS:
            stages = class_stream(train, test, base=base, increment=increment, order="pycil", seed=seed)
            found.append(course(fresh(learner), stages, seed))
        lines += [] if lines else [head("learner", found[0])]
        lines.append(row(name, found))
        print(title, lines[-1], flush=True)
    return f"## {title}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
