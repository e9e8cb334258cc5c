"""Learners that train a body, on Fashion-MNIST two classes at a time: Finetune, RehearsalFree, Replay, Joint."""

from __future__ import annotations

import torch

from benchmarks.tables.common import arguments, course, head, images, page, row, said, settings, write
from engram.core.learner import Learner, fresh
from engram.data.streams import class_stream
from engram.engine.optimizer import Optimizer
from engram.keep.finetune import Finetune
from engram.keep.joint import Joint
from engram.keep.rehearsal_free import RehearsalFree
from engram.keep.replay import Replay

SEEDS = (1993, 1994, 1995)
ROWS = 10_000
COMMON = {
    "network": {"name": "ConvNet", "channels": 1, "widths": [16, 32, 64], "norm": "group"},
    "optimizer": Optimizer("adam", lr=1e-3),
    "epochs": 4,
    "batch_size": 64,
}
LEARNERS: dict[str, Learner] = {
    "Finetune": Finetune(**COMMON),  # type: ignore[arg-type]
    "RehearsalFree": RehearsalFree(**COMMON),  # type: ignore[arg-type]
    "Replay, 500 rows": Replay(buffer=500, **COMMON),  # type: ignore[arg-type]
    "Joint": Joint(**COMMON),  # type: ignore[arg-type]
}
INTRO = f"""The first {ROWS:,} training rows and all test rows of Fashion-MNIST, 28 x 28, five tasks of two classes, a
small ConvNet trained from random weights, the same optimiser and epochs for all, no tuning. Class orders and initial
weights: seeds 1993, 1994, 1995. Figures are percent: mean ± half of the 95 % t interval over the three."""


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    given = arguments(__doc__).parse_args()
    train, test = images(given.data / "fashion_mnist")
    train = train.take(range(ROWS))
    lines = []
    for name, learner in LEARNERS.items():
        found = []
        for seed in SEEDS:
            stages = class_stream(train, test, base=2, increment=2, order="pycil", seed=seed)
            found.append(course(fresh(learner), stages, seed))
        lines += [] if lines else [head("learner", found[0])]
        lines.append(row(name, found))
        print(lines[-1], flush=True)
    body = f"{INTRO}\n\n## (2, 2, 5)\n\n" + "\n".join(lines) + f"\n\n## Settings\n\n{settings(LEARNERS)}"
    write(given.out, page("Learners that train a body", body, said()))


if __name__ == "__main__":
    main()
