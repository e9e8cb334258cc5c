"""A small vision transformer trained on CIFAR-10, to be frozen under learners of other images (CIFAR-100).

    python -m benchmarks.backbones --data FOLDER --out DIRECTORY

reads FOLDER/cifar10/train.parquet and test.parquet, and writes a model directory that `network=DIRECTORY` names. Five
layers, so that the published prompt of `keep.OnePrompt` fits; patches of 8, so that it trains in minutes on one thread.
It stands in for a transformer pretrained on ImageNet, and is far weaker: compare learners on it, not with published
figures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from engram.data.readers import read
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.models.io import save
from engram.stats.seeds import generator

NETWORK = {"name": "ViT", "patch_size": 8, "width": 96, "depth": 5, "heads": 4}
PLAN = Optimizer("adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup=0.1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--rows", type=int, default=5000, help="training rows, drawn at random")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def some(table: Table, rows: int, seed: int) -> Table:
    """So many rows at random, or all, if there are fewer."""
    return table.take(torch.randperm(len(table), generator=generator("backbone's rows", seed))[:rows])


def main() -> None:
    """Train, save, and say how well the classes are told."""
    os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")})
    torch.set_num_threads(1)
    given = arguments()
    train, test = (read(given.data / "cifar10" / f"{part}.parquet") for part in ("train", "test"))
    run = Run(seed=given.seed)
    model = Recipe(NETWORK, PLAN, given.epochs, 64)(some(train, given.rows, given.seed), given.seed, run)
    save(model, given.out)
    held = accuracy(model, some(test, 2000, given.seed))
    print(f"{given.out}: accuracy {held:.3f} on 2000 test rows, {run.cost.seconds:.0f} s")


if __name__ == "__main__":
    main()
