"""Prompts in a frozen vision transformer, on images, beside heads on its features and training of its weights.

python -m benchmarks.backbones --data DATA --out CACHE/vit-cifar10 --rows 50000 --epochs 12

makes the transformer; the comparison is that of `engram compare continual`, and goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.tables.common import arguments, by_hand, leaderboard, page, said, write
from benchmarks.tables.continual import DIFFERENCES, differences, table
from engram.compare.continual import Comparison, Contest, Stream, summarise
from engram.engine.progress import Terminal
from engram.models.heads import LinearHead
from engram.models.io import load, save
from engram.models.predictor import Predictor

BACKBONE = "vit-cifar10"  # in the cache
CLASSES, ROWS = 20, {"train": 100, "test": 100}  # every fifth class; rows of each
HEADS = ("NMC", "SLDA", "FeTrIL", "JointHead")
PROMPTS = ("OnePrompt", "OnePrompt-none", "L2P", "VirtualOutliers")
BODIES = ("Finetune", "LwF")
PAIRS = (
    *((name, "OnePrompt") for name in ("SLDA", "NMC", "L2P", "VirtualOutliers")),
    ("OnePrompt", "OnePrompt-none"),
    ("LwF", "Finetune"),
)
TITLE = "CIFAR-100, twenty classes, (4, 4, 5)"
INTRO = """Twenty classes of CIFAR-100 (every fifth one; 32 x 32, WebP at quality 95), {train} training and {test}
test rows of each, four classes at a time. All learners start from one small vision transformer (five layers of
width 96, patches of 8) that was trained on CIFAR-10, none of whose classes is in the stream:

```
python -m benchmarks.backbones --data DATA --out CACHE/vit-cifar10 --rows 50000 --epochs 12
```

It stands in for a transformer pretrained on ImageNet and is far weaker (57 % on CIFAR-10): compare rows with each
other, not with published figures. Its head is taken off. NMC, SLDA, FeTrIL, JointHead and the prompts (OnePrompt,
L2P, VirtualOutliers on OnePrompt; `OnePrompt-none` is a linear head without any prompt) leave it frozen; Finetune
and LwF train it. {epochs} epochs a task in batches of 32, of which VirtualOutliers spends a fifth on its head's phase.
Class orders: seeds 1993, 1994, 1995; mean ± half of the 95 % t interval over them. Two learning rates were tried on a
class order of their own, where 30 % of the training rows stood in for the test rows; the best was frozen: × 1 and ×
0.1 of 0.01 for prompts (0.0025 in the head's phase), of 0.001 for the transformer. VirtualOutliers has the settings
of `engram reproduce ovor`: sigma 1, 20 neighbours, 30 offsets. Accuracies are task means among all classes seen.
Parameters (thousands; buffers counted) and kB: of the model, the transformer included, kB also of all other state,
after the last task. GFLOP: while the second and the last task are learnt, along the first class order. Time: CPU
seconds of learning, as a multiple of fine-tuning's."""


def own(epochs: int) -> dict[str, dict[str, Any]]:
    """Settings of single learners; of VirtualOutliers' epochs a fifth are the head's, as published."""
    head = max(1, epochs // 5)
    rate, quarter = ({"lr": lr, "schedule": "cosine"} for lr in (1e-2, 2.5e-3))
    host = {"name": "keep.OnePrompt", "optimizer": rate, "epochs": epochs - head}
    outliers = {"sigma": 1.0, "neighbours": 20, "offsets": 30, "optimizer": quarter, "epochs": head}
    return {
        "keep.OnePrompt": {"optimizer": rate},
        "keep.OnePrompt-none": {"name": "keep.OnePrompt", "optimizer": rate, "lengths": []},
        "keep.L2P": {"optimizer": rate},
        "keep.VirtualOutliers": {"host": host, **outliers},
        "keep.FeTrIL": {"network": None},
    }


def main() -> None:
    """Do the comparison in CACHE/prompts (it goes on where it was) and write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    place = given.cache / "prompts"
    network = str(headless(given.cache / BACKBONE, place / "backbone"))
    train, test = (some(given.data / "cifar100", part, place) for part in ROWS)
    plan = Comparison(
        (Stream(str(train), str(test), base=4, increment=4),),
        learners=(*HEADS, *PROMPTS, *BODIES),
        common={
            "network": network,
            "backbone": network,
            "epochs": given.epochs,
            "batch_size": 32,
        },
        own=own(given.epochs),
        trials=2,
        budget=600.0,
    )
    rows = Contest(plan, place / f"{given.epochs}-epochs", Terminal()).execute()
    summary, hand = summarise(rows), by_hand(given.out, [TITLE, DIFFERENCES])
    intro = INTRO.format(**ROWS, epochs=given.epochs)
    apart = differences({TITLE: rows}, PAIRS, ("incremental accuracy", "final accuracy", "task-aware final"))
    board = leaderboard(given.out, "prompts", summary, TITLE)
    body = "\n\n".join(
        [
            intro,
            *hand.values(),
            f"## {TITLE}\n\n{table(summary['streams'][0]['learners'])}\n\n{board}",
            f"## {DIFFERENCES}\n\n{apart}",
        ]
    )
    write(given.out, page("Prompts in a frozen transformer", body, said()))


def headless(directory: Path, out: Path) -> Path:
    """The same transformer with a head that knows no class."""
    encoder: Any = load(directory).encoder
    save(Predictor(encoder, LinearHead(encoder.width)), out)
    return out


def some(folder: Path, part: str, out: Path) -> Path:
    """A file of the first rows of evenly spaced classes, in the order of the given one."""
    rows = pq.read_table(folder / f"{part}.parquet")
    labels = rows["label"].to_pylist()
    left = dict.fromkeys(range(0, 100, 100 // CLASSES), ROWS[part])
    kept = []
    for row, label in enumerate(labels):
        if left.get(label, 0):
            left[label] -= 1
            kept.append(row)
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.take(kept), out / f"{part}.parquet")
    return out / f"{part}.parquet"


if __name__ == "__main__":
    main()
