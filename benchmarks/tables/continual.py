"""Learners side by side along four streams of frozen features: the tables of `engram compare continual` as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.common import arguments, by_hand, leaderboard, page, said, write
from engram.compare.continual import Comparison, Contest, summarise
from engram.engine.progress import Terminal

STREAMS = {  # title: (files, classes of the first task, of each further one)
    "Fashion-MNIST, (2, 2, 5)": ("fashion_mnist", 2, 2),
    "CIFAR-100, (50, 10, 6)": ("cifar100", 50, 10),
    "CIFAR-100, (10, 10, 10)": ("cifar100", 10, 10),
    "CLINC150, (15, 15, 10)": ("clinc150", 15, 15),
}
SEARCHING = {"trials": 2, "batch_size": 64}  # learners that search for their own settings in every task
OWN: dict[str, dict[str, Any]] = {
    "keep.TAME": {"window": 10, "pruning_buffer": 500},  # a task has some dozens of batches here
    **{f"keep.{name}": SEARCHING for name in ("Independent", "Previous", "Dynamic")},
    "keep.VirtualOutliers": {"host": {"name": "keep.Finetune"}, "offsets": 100},
}
NAMES = "names.safetensors"  # vectors of class names, by benchmarks.features
MEASURES = {
    "incremental accuracy": "incremental",
    "final accuracy": "final",
    "task-aware final": "final, task known",
    "forgetting": "forgetting",
    "learning accuracy": "just learnt",
}
INTRO = """Every learner sees the same frozen features, which `python -m benchmarks.features` writes: images through the
ResNet-56 trained on CIFAR-10 (64 numbers), sentences through MiniLM (384). A learner that trains a network
trains an MLP with one hidden layer of 128 on them, {epochs} epochs a task. Class orders: seeds 1993, 1994,
1995; mean ± half of the 95 % t interval over them. Every learner tried at most {trials} learning rates within
{budget:.0f} seconds on a class order of its own; the best was frozen. Accuracies are task means among all
classes seen. kB: of the model and all state after the last task. GFLOP: while the second task is learnt.
Methods that need images are in [prompts](prompts.md). A few have settings of their own, which the module
lists (`OWN`, `named`): TAME a window of 10 losses, since a task has some dozens of batches; Independent,
Previous and Dynamic two trials a task; VirtualOutliers fine-tuning for its host, and 100 offsets at each point
of the border. LingoCL's vectors are the class names through MiniLM (384), its host is LwF, or Replay where it
says `-replay`; `-random` is the control, random directions of the same width in place of names."""
SHOWS = "What it shows, method by method"  # by hand; a page that is made anew keeps it


def named(data: Path) -> dict[str, dict[str, Any]]:
    """LingoCL on two hosts, each with vectors of names and with random ones."""
    names, random = {"encoder": str(data / NAMES)}, {"encoder": "random", "width": 384}
    replay = {"name": "keep.LingoCL", "host": {"name": "keep.Replay"}}
    return {
        "keep.LingoCL": names,
        "keep.LingoCL-random": {"name": "keep.LingoCL", **random},
        "keep.LingoCL-replay": {**replay, **names},
        "keep.LingoCL-replay-random": {**replay, **random},
    }


def main() -> None:
    """Do the comparisons in CACHE/continual (they go on where they were) and write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--budget", type=float, default=15.0)
    parser.add_argument("--buffer", type=int, default=500)
    parser.add_argument("--learners", nargs="+", default=[])
    parser.add_argument("--streams", nargs="+", type=int, help="do these now, by number, and write no page")
    given = parser.parse_args()
    hand = by_hand(given.out, STREAMS)
    parts = [
        INTRO.format(epochs=given.epochs, trials=given.trials, budget=given.budget),
        *filter(None, [hand.pop(SHOWS, "")]),
    ]
    for number, (title, (name, base, increment)) in enumerate(STREAMS.items()):
        if given.streams and number not in given.streams:
            continue
        plan = Comparison(
            str(given.data / f"{name}-train.parquet"),
            str(given.data / f"{name}-test.parquet"),
            base=base,
            increment=increment,
            learners=tuple(given.learners),
            common={
                "network": {"name": "MLP", "hidden": [128]},
                "epochs": given.epochs,
                "buffer": given.buffer,
                "classes_total": 150,
            },
            own={**OWN, **named(given.data)},
            trials=given.trials,
            budget=given.budget,
        )
        place = f"{name}-{base}-{increment}"
        contest = Contest(plan, given.cache / "continual" / place, Terminal())
        summary = summarise(contest.execute())
        board = leaderboard(
            given.out, place, summary, f"{title}, {len(contest.train):,} training rows, frozen features"
        )
        parts.append(f"## {title}\n\n{table(summary)}\n\n{board}")
        print(title, "done", flush=True)
        if not given.streams:
            write(given.out, page("Learners side by side", "\n\n".join([*parts, *hand.values()]), said()))


def table(summary: Mapping[str, Any]) -> str:
    """Learners by incremental accuracy, in percent."""
    lines = [
        f"| learner | {' | '.join(MEASURES.values())} | rows held | kB | GFLOP | learning rate |",
        f"|---|{'---:|' * (len(MEASURES) + 3)}---|",
    ]
    failed = []
    for entry in summary["learners"]:
        values = entry["measures"]
        if not values["incremental accuracy"]:
            failed.append(f"`{entry['learner']}`: {entry['failed'][0]}")
            continue
        cells = [_percent(values[key]) for key in MEASURES]
        held = [
            f"{values['rows held'][0]:.0f}",
            f"{values['bytes'][0] / 1024:.0f}",
            f"{values['GFLOP of a task'][0]:.1f}",
        ]
        rate = f"× {entry['setting']['lr']:g}" if "lr" in entry["setting"] else "its own"
        lines.append(f"| `{entry['learner']}` | {' | '.join([*cells, *held])} | {rate} |")
    return "\n".join([*lines, *(["", "Failed: " + "; ".join(failed)] if failed else [])])


def _percent(found: list[float] | None) -> str:
    return "–" if not found else f"{100 * found[0]:.1f} ± {100 * found[1]:.1f}"


if __name__ == "__main__":
    main()
