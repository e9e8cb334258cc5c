"""Forgetters side by side on Fashion-MNIST: the table of `engram compare unlearning` as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.tables.common import arguments, by_hand, leaderboard, page, said, write
from engram.compare.unlearning import KINDS, Comparison, Contest, summarise
from engram.engine.progress import Terminal

INTRO = """The first {rows:,} training and test rows of Fashion-MNIST, an MLP 784-128-10, Adam, 15 epochs. Three kinds
of requests: 2 % of the rows at random, a class, and the larger of two clusters of a class. Gap: mean absolute
difference to the mean of five models retrained without the rows, in accuracy on forget, retain and test rows
and in the AUC of a membership attack by loss; 0 is as good as retraining, and the row of retraining shows what
is left between equals, that of "nothing" what a request costs whoever does nothing about it. Mean ± half of the
95 % t interval over three seeds. Every method had at most five settings and 60 seconds for each kind of
request, on a tuning request (another class, other rows); the chosen one was frozen. Cost: CPU seconds against
retraining. Left out are the three methods that train tens or hundreds of models for a request (datamodel
matching and direct, oracle matching) and the two that are for regressors. The order of `--method auto` follows
this table."""
LEFT_OUT = (
    *("forget.DatamodelMatching", "forget.DatamodelDirect", "forget.OracleMatching"),
    *("forget.Blindspot", "forget.GaussianFineTune"),
)


def main() -> None:
    """Do the comparison in CACHE/unlearning (it goes on where it was) and write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    given = parser.parse_args()
    place = given.data / "fashion_mnist"
    plan = Comparison(
        str(place / "train.parquet"),
        str(place / "test.parquet"),
        limit=given.rows,
        network={"name": "MLP", "hidden": [128]},
        epochs=15,
        methods=tuple(name for name in Comparison().names if name not in LEFT_OUT),
    )
    out = given.cache / "unlearning"
    summary = summarise(Contest(plan, out, Terminal()).execute())
    intro = f"Fashion-MNIST, {given.rows:,} training rows, an MLP of 128, seeds {plan.seeds}"
    board = leaderboard(given.out, "unlearning", summary, intro)
    kinds = map_kinds(summary["methods"])
    hand = by_hand(given.out, kinds)
    body = [INTRO.format(rows=given.rows), board, _overall(summary["methods"]), *hand.values(), *kinds.values()]
    write(given.out, page("Forgetters side by side", "\n\n".join(body), said()))
    ranking = json.loads((out / "ranking.json").read_text())
    print(json.dumps({**ranking, "data": "Fashion-MNIST", "command": said()}, indent=1))


def map_kinds(methods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A section for every kind of request, by title."""
    titles = {kind: f"{kind.capitalize()} requests" for kind in KINDS}
    return {title: f"## {title}\n\n{_of_kind(methods, kind)}" for kind, title in titles.items()}


def _overall(methods: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| method | gap | " + " | ".join(KINDS) + " | cost | needs |",
        "|---|---:|" + "---:|" * len(KINDS) + "---:|---|",
    ]
    for entry in methods:
        gaps = [_spread((entry["kinds"].get(kind) or {}).get("gap")) for kind in KINDS]
        failed = f" (failed: {entry['failed'][0]})" if entry["failed"] else " (a guard)" * entry["guard"]
        cost = f"{entry['cost'][0]:.2f}×" if entry["cost"] else "–"
        needed = ", ".join(entry["needed"])
        lines.append(
            f"| `{entry['method']}`{failed} | {_spread(entry['gap'])} | {' | '.join(gaps)} | {cost} | {needed} |"
        )
    return "\n".join(lines)


def _of_kind(methods: Sequence[Mapping[str, Any]], kind: str) -> str:
    measures = ("forget accuracy", "retain accuracy", "test accuracy", "membership AUC")
    lines = ["| method | " + " | ".join(measures) + " | setting |", "|---|" + "---:|" * len(measures) + "---|"]
    for entry in methods:
        found = entry["kinds"].get(kind)
        if found:
            setting = ", ".join(_setting(*item) for item in entry["settings"][kind].items()) or "its own"
            lines.append(f"| `{entry['method']}` | {' | '.join(_spread(found[m]) for m in measures)} | {setting} |")
    return "\n".join(lines)


def _setting(key: str, value: Any) -> str:
    return f"{value:g} × its learning rate" if key == "optimizer" else f"{key} {value}"


def _spread(found: Sequence[float] | None) -> str:
    return "–" if not found else f"{found[0]:.3f} ± {found[1]:.3f}"


if __name__ == "__main__":
    main()
