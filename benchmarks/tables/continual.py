"""Learners side by side along six streams of frozen features: the tables of `engram compare continual` as a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.common import arguments, by_hand, leaderboard, page, said, write
from engram.compare.continual import Comparison, Contest, Stream, summarise
from engram.compare.work import Row, spread
from engram.engine.progress import Terminal

STREAMS = {  # title: (files, classes of the first task, of each further one)
    "Fashion-MNIST, (2, 2, 5)": ("fashion_mnist", 2, 2),
    "CIFAR-100, (50, 10, 6)": ("cifar100", 50, 10),
    "CIFAR-100, (10, 10, 10)": ("cifar100", 10, 10),
    "CLINC150, (15, 15, 10)": ("clinc150", 15, 15),
    "Banking77, (11, 11, 7)": ("banking77", 11, 11),
    "CIFAR-100, (10, 10, 10), through ResNet-20": ("cifar100_resnet20", 10, 10),
}
SEARCHING = {"trials": 2, "batch_size": 64}  # learners that search for their own settings in every task
OWN: dict[str, dict[str, Any]] = {
    "keep.TAME": {"window": 10, "pruning_buffer": 500},  # a task has some dozens of batches here
    **{f"keep.{name}": SEARCHING for name in ("Independent", "Previous", "Dynamic")},
    "keep.TaskFreeMAS": {  # five updates a batch as it is; without a clipped gradient its loss grows without bound here
        "epochs": 1,
        "plateau_mean": 2.0,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0, "clip": 1.0},
    },
    "keep.VirtualOutliers": {"host": {"name": "keep.Finetune"}, "offsets": 100},
}
IMAGES_ALONE = ("keep.ConTraCon",)  # left out: it reads images
NAMES = "names.safetensors"  # vectors of class names, by benchmarks.features
MEASURES = {
    "incremental accuracy": "incremental",
    "final accuracy": "final",
    "task-aware final": "final, task known",
    "forgetting": "forgetting",
    "learning accuracy": "just learnt",
}
INTRO = """Every learner sees the same frozen features, which

```
python -m benchmarks.features --data DATA --encoder ENCODER --out FEATURES --rows 50 --tests 20
```

writes: images through the ResNet-56 trained on CIFAR-10, or ResNet-20 where it says so (64 numbers), sentences
through MiniLM (384); 50 training and 20 test rows of each class (a few of Banking77 have fewer), of Fashion-MNIST 500
and 200. A learner that trains a network trains an MLP with one hidden layer of 128 on them, {epochs} epochs a task.
Class orders: seeds 1993, 1994, 1995; mean ± half of the 95 % t interval over them. Every learner tried at most
{trials} learning rates within {budget:.0f} seconds on a class order of its own, where 30 % of the training rows stood
in for the test rows; the best was frozen. Accuracies are task means among all classes seen. Parameters: all numbers
in the model after the last task, buffers such as class means among them, in thousands; kB: of the model and all other
state. GFLOP: while the second and the last task are learnt, along the first class order. Time: CPU seconds of
learning all tasks, as a multiple of fine-tuning's along the same stream. Methods that need images are in
[prompts](prompts.md). A few have settings of their own, which the module lists (`OWN`, `named`): TAME a window of 10
losses, since a task has some dozens of batches; TaskFreeMAS one pass of five updates a batch with a clipped gradient;
Independent, Previous and Dynamic two trials a task; VirtualOutliers fine-tuning for its host, and 100 offsets at each
point of the border. LingoCL's vectors are the class names through MiniLM (384), its host is LwF, or Replay where it
says `-replay`; `-random` is the control, random directions of the same width in place of names."""
PAIRS = (  # what is said of one beside the other
    ("SLDA", "JointHead"),
    ("Joint", "JointHead"),
    *((name, "Replay") for name in ("MIR", "GSS", "ICaRL", "DERpp", "TaskFreeMAS", "LingoCL-replay")),
    ("LingoCL-replay", "LingoCL-replay-random"),
    ("LingoCL", "LwF"),
    ("LingoCL", "LingoCL-random"),
    ("FastSlow", "MIR"),
    ("RehearsalFree", "Finetune"),
)
TWINS = "CIFAR-100, (10, 10, 10)", "CIFAR-100, (10, 10, 10), through ResNet-20"
DIFFERENCES = "Differences, paired by class order"
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


def names(own: Mapping[str, Any]) -> tuple[str, ...]:
    """All learners that take features."""
    return tuple(name for name in dict.fromkeys((*Comparison().names, *own)) if name not in IMAGES_ALONE)


def main() -> None:
    """Do the comparisons in CACHE/continual (they go on where they were) and write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--budget", type=float, default=30.0)
    parser.add_argument("--buffer", type=int, default=500)
    parser.add_argument("--learners", nargs="+", default=[], help="by default all that can be compared")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--streams", nargs="+", type=int, help="do these now, by number, and write no page")
    given = parser.parse_args()
    hand = by_hand(given.out, [*STREAMS, DIFFERENCES])
    found: dict[str, list[Row]] = {}
    parts = [
        INTRO.format(epochs=given.epochs, trials=given.trials, budget=given.budget),
        *filter(None, [hand.pop(SHOWS, "")]),
    ]
    for number, (title, (name, base, increment)) in enumerate(STREAMS.items()):
        if given.streams and number not in given.streams:
            continue
        train, test = (str(given.data / f"{name}-{part}.parquet") for part in ("train", "test"))
        own = {**OWN, **named(given.data)}
        plan = Comparison(
            (Stream(train, test, base, increment),),
            learners=tuple(given.learners) or names(own),
            common={
                "network": {"name": "MLP", "hidden": [128]},
                "epochs": given.epochs,
                "buffer": given.buffer,
                "classes_total": 150,
            },
            own=own,
            trials=given.trials,
            budget=given.budget,
            jobs=given.jobs,
        )
        place = f"{name}-{base}-{increment}"
        contest = Contest(plan, given.cache / "continual" / place, Terminal())
        if given.estimate:
            print(f"{contest.estimate()}; {contest.trial()}", flush=True)
            continue
        found[title] = contest.execute()
        summary = summarise(found[title])
        board = leaderboard(given.out, place, summary, f"{title}, on frozen features")
        parts.append(f"## {title}\n\n{table(summary['streams'][0]['learners'])}\n\n{board}")
        print(title, "done", flush=True)
    if len(found) == len(STREAMS):
        parts += [
            f"## {DIFFERENCES}\n\n{differences(found, PAIRS, list(MEASURES)[:2])}",
            twins(*(found[title] for title in TWINS)),
        ]
        write(given.out, page("Learners side by side", "\n\n".join([*parts, *hand.values()]), said()))


def table(learners: Sequence[Mapping[str, Any]]) -> str:
    """Learners by incremental accuracy, in percent, with what they hold and cost."""
    costs = ("rows held", "parameters", "kB", "GFLOP", "time")
    lines = [
        f"| learner | {' | '.join((*MEASURES.values(), *costs))} | learning rate |",
        f"|---|{'---:|' * (len(MEASURES) + len(costs))}---|",
    ]
    plain = {entry["learner"]: entry["measures"]["seconds"] for entry in learners}.get("keep.Finetune")
    for entry in (entry for entry in learners if entry["measures"]["incremental accuracy"]):
        values = entry["measures"]
        cells = [*(_percent(values[key]) for key in MEASURES), *_costs(values, plain)]
        rate = f"× {entry['setting']['lr']:g}" if "lr" in entry["setting"] else "its own"
        lines.append(f"| `{entry['learner']}` | {' | '.join(cells)} | {rate} |")
    failed = [f"`{entry['learner']}`: {entry['failed'][0]}" for entry in learners if entry["failed"]]
    return "\n".join([*lines, *(["", "Failed: " + "; ".join(failed)] if failed else [])])


def differences(found: Mapping[str, Sequence[Row]], pairs: Iterable[tuple[str, str]], measures: Iterable[str]) -> str:
    """One learner less another, in points: mean over class orders, half of the 95 % t interval; a column a stream."""
    wanted = list(measures)
    lines = [f"| difference | measure | {' | '.join(found)} |", f"|---|---|{'---:|' * len(found)}"]
    for one, other in pairs:
        for measure in wanted:
            cells = [_percent(spread(_less(rows, one, other, measure))) for rows in found.values()]
            lines.append(f"| {one} − {other} | {MEASURES[measure]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _less(rows: Sequence[Row], one: str, other: str, measure: str) -> list[float]:
    values = {(row["learner"], row["seed"]): row[measure] for row in rows if not row["tuning"]}
    seeds = sorted(seed for name, seed in values if name == f"keep.{one}")
    return [values[f"keep.{one}", seed] - values[f"keep.{other}", seed] for seed in seeds]


def twins(one: Sequence[Row], other: Sequence[Row]) -> str:
    """How alike two streams of the same classes rank the learners."""
    from scipy.stats import spearmanr

    means = [
        {e["learner"]: e["measures"]["incremental accuracy"][0] for e in summarise(rows)["streams"][0]["learners"]}
        for rows in (one, other)
    ]
    pairs = [(means[0][name], means[1][name]) for name in means[0]]
    rank, far = spearmanr(pairs).statistic, max(abs(a - b) for a, b in pairs)
    return (
        f"CIFAR-100 in ten tasks through ResNet-56 and through ResNet-20: rank correlation of the learners by "
        f"incremental accuracy {rank:.2f}, largest difference {100 * far:.1f} points."
    )


def _costs(values: Mapping[str, list[float]], plain: list[float] | None) -> list[str]:
    """Rows held, thousands of parameters, kB, operations of the second task and the last, multiple of plain seconds."""
    flops = (f"{values[f'GFLOP of the {which} task'][0]:.1f}" for which in ("second", "last"))
    return [
        f"{values['rows held'][0]:.0f}",
        f"{values['parameters'][0] / 1000:.0f}",
        f"{values['bytes'][0] / 1024:.0f}",
        " / ".join(flops),
        f"{values['seconds'][0] / plain[0]:.1f}" if plain else "–",
    ]


def _percent(found: list[float] | None) -> str:
    return "–" if not found else f"{100 * found[0]:.1f} ± {100 * found[1]:.1f}"


if __name__ == "__main__":
    main()
