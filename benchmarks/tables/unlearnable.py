"""Bayes error noise on CIFAR-10: what protected images teach, alone and beside clean ones."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.tables.common import arguments, by_hand, images, page, said, write
from engram.data.table import Table, shuffled
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.protect.bayes_error_noise import PIXELS, BayesErrorNoise, stored
from engram.reproduce.provably_unlearnable_examples import error_minimising
from engram.stats.intervals import mean
from engram.stats.seeds import generator

EPS = 8 / 255
SGD = Optimizer("sgd", lr=0.1, nesterov=True, weight_decay=5e-4, schedule="cosine", warmup=0.1)
INTRO = """Of {rows:,} training rows of CIFAR-10, drawn anew for each of {seeds} seeds, half are clean and half belong
to somebody who protects them by at most 8/255 a pixel: {steps} steps of Adam at 1e-3 up the Bayes error in
the features of a fresh network, which is trained for {fresh} epochs on the images as they are, every
{refresh} steps (sigma 0.3). What a network learns from them is its accuracy on {test:,} clean test rows
after {epochs} epochs (batches of {batch}, SGD {lr:g}, cosine decay, no augmentation). The network is a {network},
{widths} wide. Controls of the same size: random signs, and error-minimising noise (Huang et al., ICLR
2021; {rounds} epochs by turns with {turn} steps of the images each). Percent, mean ± half of the 95 % t interval."""


def main() -> None:
    """Do the seeds (they are kept in the cache) and write the page."""
    torch.set_num_threads(1)
    given = _arguments()
    train, test = images(given.data / "cifar10")
    test = test.take(range(given.test_rows))
    run = Run(
        given.cache / f"unlearnable-{given.network}-{given.rows}-{given.steps}-{given.epochs}", device=given.device
    )
    found = [_kept(train, test, seed, given, run) for seed in given.seeds]
    if len(given.seeds) > 1:
        body = [_body(found, given, len(test)), *by_hand(given.out, ()).values()]
        write(given.out, page("Images that shall not be learnt from", "\n\n".join(body), said()))


def _kept(train: Table, test: Table, seed: int, given: argparse.Namespace, run: Run) -> dict[str, float]:
    return run.phase(f"seed {seed}", lambda: _seed(train, test, seed, given, run))


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="training rows, clean and protected together")
    parser.add_argument("--test-rows", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--refresh", type=int, default=10)
    parser.add_argument("--fresh", type=int, default=20, help="epochs of each fresh network")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--network", default="ResNet", choices=["ResNet", "ConvNet"])
    parser.add_argument("--blocks", type=int, default=2, help="of the ResNet, at each width")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=SGD.lr)
    parser.add_argument("--minimising", nargs=2, type=int, default=[20, 20], help="its epochs, and steps after each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _seed(train: Table, test: Table, seed: int, given: argparse.Namespace, run: Run) -> dict[str, float]:
    """Accuracy by what was learnt from, and the Bayes error before and after."""
    order = shuffled(len(train), seed, 0)[: given.rows]
    clean, own = (_floats(train.take(part)) for part in order.tensor_split(2))
    network = {"name": given.network, "widths": given.widths}
    if given.network == "ResNet":
        network["blocks"] = given.blocks
    judge = Recipe(network, replace(SGD, lr=given.lr), given.epochs, given.batch, train.classes)
    fresh = replace(judge, epochs=given.fresh)
    method = BayesErrorNoise(eps=EPS, steps=given.steps, refresh=given.refresh, recipe=fresh, chunk=1000)
    run = run.with_seed(seed)
    pixels = own.inputs[PIXELS]
    signs = torch.randint(0, 2, pixels.shape, generator=generator("signs", seed)) * 2.0 - 1
    others = {
        "unprotected": own,
        "protected": method.protect(own, run),
        "random signs": replace(own, inputs={PIXELS: stored((pixels + EPS * signs).clamp(0, 1), pixels, EPS)}),
        "error-minimising": error_minimising(own, seed, *given.minimising, eps=EPS, network=network, lr=2e-3, run=run),
    }

    def learnt(table: Table) -> float:
        return accuracy(judge(table, seed, run), test, run=run)

    return {
        "clean half alone": learnt(clean),
        **{f"{name} half alone": learnt(table) for name, table in others.items()},
        **{f"clean and {name} half": learnt(clean.concat(table)) for name, table in others.items()},
        "Bayes error, unprotected": method.estimate(own, run),
        "Bayes error, protected": method.estimate(others["protected"], run),
    }


def _floats(table: Table) -> Table:
    return replace(table, inputs={PIXELS: table.inputs[PIXELS].float() / 255})


def _body(found: list[dict[str, float]], given: argparse.Namespace, test: int) -> str:
    intro = INTRO.format(
        rows=given.rows,
        seeds=len(found),
        steps=given.steps,
        fresh=given.fresh,
        refresh=given.refresh,
        test=test,
        epochs=given.epochs,
        lr=given.lr,
        batch=given.batch,
        network=f"ResNet of {2 * given.blocks * len(given.widths) + 2} layers"
        if given.network == "ResNet"
        else "ConvNet",
        rounds=given.minimising[0],
        turn=given.minimising[1],
        widths="/".join(map(str, given.widths)),
    )
    lines = ["| learnt from | accuracy on clean test rows | against the clean half alone |", "|---|---:|---:|"]
    clean = [row["clean half alone"] for row in found]
    for name in found[0]:
        values = [row[name] for row in found]
        beside = "" if name.startswith("Bayes") else _spread([v - c for v, c in zip(values, clean, strict=True)], "+")
        lines.append(f"| {name} | {_spread(values)} | {beside} |")
    return f"{intro}\n\n" + "\n".join(lines)


def _spread(values: list[float], sign: str = "") -> str:
    estimate = mean(values)
    return f"{100 * estimate.value:{sign}.1f} ± {50 * (estimate.high - estimate.low):.1f}"


if __name__ == "__main__":
    main()
