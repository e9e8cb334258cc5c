"""Forgetters of language models side by side: the table of `engram compare language` as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import yaml

from benchmarks.tables.common import arguments, by_hand, leaderboard, page, said, write
from engram.compare.language import Comparison, Contest, summarise
from engram.engine.progress import Terminal

CHOSEN = "Settings that were chosen"
MEASURES = ("utility", "forget probability", "forget ROUGE-L", "retain probability", "retain ROUGE-L")
INTRO = """TOFU: {authors} authors, {pairs} pairs, learnt by a GPT-2 of {layers} layers, {width} wide, with a byte-pair
tokenizer of {vocabulary:,} tokens, trained from nothing for {epochs} epochs. Before anything is forgotten
{known:.1%} of the answers come back by greedy decoding with a ROUGE-L recall of 0.95 or more ({exact:.1%} word
for word); of those of authors that a model never saw it gives {others:.1%}. Then a share of the authors must be
forgotten. Forget quality is the p-value of a Kolmogorov-Smirnov test against the model of the same seed that
was trained without them (geometric mean over seeds, and how many of the seeds pass 0.05); utility the harmonic
mean of probability, ROUGE-L and truth ratio on retained pairs, for a model that was trained from nothing knows
neither real authors nor world facts. **A model in ruins can have a high forget quality too: read it beside the
utility.** Mean ± half of the 95 % t interval over three seeds. Every method tried {trials} settings on {tuned};
all that train do so for {last} epochs (AdamW, linear decay, batches of {batch} forget pairs)."""
GUARD = """**{names} erase{s} nothing from the weights.** A guard: figures are those of the model
that is asked through it; whoever holds the weights behind it gets the row of Nothing."""


def main() -> None:
    """Do the comparison in CACHE/language (it goes on where it was) and write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", default=[], help="default: all")
    parser.add_argument("--points", nargs="+", type=int, default=[4, 10], help="epochs that are measured")
    parser.add_argument("--plan", type=yaml.safe_load, default={}, help="YAML: other settings of the comparison")
    given = parser.parse_args()
    more = {key: tuple(value) if isinstance(value, list) else value for key, value in given.plan.items()}
    plan = Comparison(str(given.data / "tofu"), methods=tuple(given.methods), points=tuple(given.points), **more)
    contest = Contest(plan, given.cache / "language", Terminal())
    rows = contest.execute()
    summary = summarise(rows)
    learnt = summary["learnt"]
    intro = INTRO.format(
        authors=contest.authors,
        width=plan.network["n_embd"],
        layers=plan.network["n_layer"],
        vocabulary=plan.vocabulary,
        batch=plan.batch_size,
        tuned="other authors" if plan.authors else "forgetting other authors of them",
        pairs=len(contest.train),
        epochs=plan.epochs,
        known=learnt["known"][0],
        exact=learnt["word for word"][0],
        others=learnt["known of others"][0],
        trials=plan.trials,
        last=plan.points[-1],
    )
    tables = {_title(share): _share(summary, share, rows) for share in summary["shares"]} | {CHOSEN: _settings(summary)}
    hand = by_hand(given.out, tables)
    found = {**hand, **{title: f"## {title}\n\n{text}" for title, text in tables.items()}}
    board = leaderboard(given.out, "language", summary, f"TOFU, {contest.authors} authors, seeds {plan.seeds}")
    parts = [intro, *_guards(summary), board, *found.values()]
    write(given.out, page("Forgetters of language models side by side", "\n\n".join(parts), said()))


def _title(share: str) -> str:
    return f"{float(share):.0%} of the authors forgotten"


def _guards(summary: Mapping[str, Any]) -> list[str]:
    names = [entry["method"] for entry in summary["forgetters"] if entry["guard"]]
    return [GUARD.format(names=" and ".join(names), s="" if len(names) > 1 else "s")] if names else []


def _share(summary: Mapping[str, Any], share: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| method | forget quality (seeds over 0.05) | {' | '.join(MEASURES)} |",
        f"|---|---:|{'---:|' * len(MEASURES)}",
    ]
    for entry in summary["forgetters"]:
        found = entry["shares"][share]["measures"]
        quality = _quality(rows, entry["method"], float(share))
        lines.append(f"| {entry['method']} | {quality} | {' | '.join(_spread(found[key]) for key in MEASURES)} |")
    return "\n".join(lines)


def _quality(rows: list[dict[str, Any]], method: str, share: float) -> str:
    mine = [row for row in rows if row["method"] == method and not row["tuning"] and row["fraction"] == share]
    last = max((row["epoch"] for row in mine), default=0)
    values = torch.tensor([row["forget quality"] for row in mine if row["epoch"] == last and not row["error"]])
    if not len(values):
        return "–"
    mean = float(values.double().clamp(min=1e-300).log().mean().exp())
    return f"{mean:.1e} ({int((values > 0.05).sum())} of {len(values)})"


def _settings(summary: Mapping[str, Any]) -> str:
    lines = []
    for entry in summary["forgetters"]:
        setting = ", ".join(f"{key} {value}" for key, value in entry["setting"].items() if key != "name")
        lines.append(
            f"- {entry['method']}: {entry['setting'].get('name', 'nothing')}{', ' if setting else ''}{setting}"
        )
    return "\n".join(lines)


def _spread(found: list[float] | None) -> str:
    return "–" if not found else f"{found[0]:.3f} ± {found[1]:.3f}"


if __name__ == "__main__":
    main()
