"""Prompts about twenty of a hundred invented people are read with noise: a guard forgets, and its model does not.

The world: every person lives in a town of two words, drawn from twenty by twenty, so that whoever never heard of a
person guesses it once in four hundred; a GPT-2 of one layer learns it in two wordings. A third wording, and twenty
people of whom nobody tells, are kept for the classifier alone. The classifier has an easy task: a name is a token.

The size of the world and the mean over two wordings were settled with the first seeds in sight (of 100 towns, chance
alone gave seed 0 two of forty answers); the bands were not. Seeds 200 to 204, looked at once: 0 to 0.025 of the answers
left, no retained row moved, forget quality 0.01 to 0.57 with a mean of 0.22; two of the five lie below 0.05.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram.audit.tofu import evaluate, forget_quality
from engram.core.request import Request
from engram.data.table import IGNORED, Table
from engram.engine.predict import hits, predict
from engram.engine.run import Run
from engram.forget.eco import ECO
from engram.reproduce.claims import Claim
from engram.reproduce.facts import STOP, SmallGPT2
from engram.stats.seeds import generator

PEOPLE, GONE, STRANGERS, TOWNS, WRONG = 100, 20, 20, 20, 5
PERSON = -1
WORDINGS = ((3, 4, PERSON, 5, 9), (6, PERSON, 7, 9), (8, 4, 6, PERSON, 7, 9))  # the last one is never learnt from
NAMES = 10  # the first token of a name; behind the names, the words of towns
WORLD = (PEOPLE + STRANGERS + 2 * TOWNS + 1) // 2  # SmallGPT2 has 10 + 2 WORLD tokens
LONGEST, WIDTH = 9, 32


def told(people: Tensor, wording: int, towns: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and labels [n, 9] of these people, living in towns [n, 2]."""
    form = torch.tensor(WORDINGS[wording]).expand(len(people), -1)
    question = torch.where(form == PERSON, NAMES + people[:, None], form)
    answer = torch.cat([towns, torch.full((len(people), 1), STOP)], 1)
    ids = torch.cat([question, answer], 1)
    labels = torch.where(torch.arange(ids.shape[1]) < form.shape[1], IGNORED, ids)
    empty = LONGEST - ids.shape[1]
    return nn.functional.pad(ids, (0, empty)), nn.functional.pad(labels, (0, empty), value=IGNORED)


def people(seed: int, wording: int) -> Table:
    """A row for each of the hundred, with five wrong towns beside the right one."""
    everyone, first = torch.arange(PEOPLE), NAMES + PEOPLE + STRANGERS
    draws = generator("people and towns", seed)
    offset = torch.tensor([first, first + TOWNS])
    towns = torch.randint(TOWNS, (1 + WRONG, PEOPLE, 2), generator=draws) + offset
    ids, labels = told(everyone, wording, towns[0])
    wrong = [told(everyone, wording, other) for other in towns[1:]]
    extra = {
        "perturbed_ids": torch.stack([ids for ids, _ in wrong], 1),
        "perturbed_labels": torch.stack([labels for _, labels in wrong], 1),
    }
    inputs = {"input_ids": ids, "attention_mask": (labels.ne(IGNORED).flip(1).cumsum(1).flip(1) > 0).long()}
    return Table(inputs, labels, tuple(f"person {k}, wording {wording}" for k in everyone.tolist()), extra)


class Setting(NamedTuple):
    """Rows of both wordings, of those to forget and of the others; a model of all, and one of the others alone."""

    gone: Table
    kept: Table
    model: nn.Module
    retrained: nn.Module


@cache
def setting(seed: int) -> Setting:
    """What a seed is measured in. About 6 s."""
    both = [people(seed, wording) for wording in (0, 1)]
    gone, kept = (both[0].take(part).concat(both[1].take(part)) for part in (range(GONE), range(GONE, PEOPLE)))
    recipe = SmallGPT2(WORLD, positions=LONGEST)
    return Setting(gone, kept, recipe(gone.concat(kept), seed), recipe(kept, seed))


def guarded(seed: int, **other: Any) -> Any:
    """The guarded model; noise on all coordinates, as for TOFU in the paper."""
    here = setting(seed)
    request = Request.of_records(here.gone.concat(here.kept), here.gone.ids)
    return ECO(**{"dims": WIDTH, **other}).forget(here.model, request, Run(seed=seed))


# --- what is measured


def quality(model: nn.Module, seed: int) -> float:
    """Forget quality: p-value against the retrained model over the twenty people, mean over the two wordings."""
    here = setting(seed)
    wordings = [{"forget": here.gone.take(range(k * GONE, (k + 1) * GONE))} for k in (0, 1)]
    return sum(forget_quality(evaluate(model, rows), evaluate(here.retrained, rows)) for rows in wordings) / 2


def exact(model: nn.Module, table: Table) -> float:
    """Share of answers that are right, word for word."""
    return float(hits(model, table).double().mean())


def moved(guard: nn.Module, bare: nn.Module, table: Table) -> float:
    """Share of rows of which the guard says anything else, by any bit, than the model."""
    one, other = (predict(model, table) for model in (guard, bare))
    return float((one != other).flatten(1).any(1).double().mean())


def new_prompts(seed: int) -> dict[str, Tensor]:
    """Prompts that the classifier has not seen [n, T]: the third wording, of people to forget and to keep; and
    strangers in the first."""
    third = people(seed, 2).inputs["input_ids"][:, : len(WORDINGS[2])]
    strangers, nowhere = torch.arange(PEOPLE, PEOPLE + STRANGERS), torch.zeros(STRANGERS, 2, dtype=torch.long)
    asked = told(strangers, 0, nowhere)[0][:, : len(WORDINGS[0])]
    return {"gone": third[:GONE], "kept": third[GONE:], "strangers": asked}


@dataclass(frozen=True)
class Figures:
    """Answers right word for word: on prompts to forget, of the guard, of the retrained model and of the guard's own
    weights. Retained rows told otherwise. Forget quality of model and guard. Flagged: new prompts, by kind."""

    left: float
    never_knew: float
    inside: float
    moved: float
    quality_before: float
    quality: float
    flagged: dict[str, float]


@cache
def measure(seed: int) -> Figures:
    """The figures of a seed. About 6 s, nearly all of it the two models."""
    here, guard = setting(seed), guarded(seed)
    return Figures(
        exact(guard, here.gone),
        exact(here.retrained, here.gone),
        exact(guard.inner, here.gone),
        moved(guard, here.model, here.kept),
        quality(here.model, seed),
        quality(guard, seed),
        {kind: float(guard.flagged(input_ids=ids).double().mean()) for kind, ids in new_prompts(seed).items()},
    )


def claims(seeds: Iterable[int]) -> list[Claim]:
    """What is left, what it cost, what is still inside, and what the classifier makes of new prompts. About 6 s a
    seed."""
    found = [measure(seed) for seed in seeds]
    return [
        Claim(
            "answers left on prompts to forget",
            "close to a retrained model (TOFU), near chance (WMDP); chance is 0.0025 here",
            (0.0, 0.05),
            tuple(f.left for f in found),
        ),
        Claim(
            "retained prompts of which a bit is told otherwise",
            "nearly no side effect",
            (0.0, 0.01),
            tuple(f.moved for f in found),
        ),
        Claim(
            "forget quality before, p",
            "(far below 0.05)",
            (0.0, 1e-3),
            tuple(f.quality_before for f in found),
        ),
        Claim("forget quality, p", "above 0.05 on TOFU", (0.05, 1.0), tuple(f.quality for f in found)),
        Claim(
            "answers that the weights inside still give",
            "no weight is changed",
            (0.95, 1.0),
            tuple(f.inside for f in found),
        ),
        Claim(
            "prompts to forget that are flagged in a wording never seen",
            "conformal: 0.95 of new prompts of the same kind",
            (0.9, 1.0),
            tuple(f.flagged["gone"] for f in found),
        ),
        Claim(
            "prompts to keep that are flagged in a wording never seen",
            "nearly no side effect",
            (0.0, 0.05),
            tuple(f.flagged["kept"] for f in found),
        ),
        Claim(
            "prompts about strangers that are flagged",
            "real authors and world facts are kept out of training, and stay unflagged",
            (0.0, 0.05),
            tuple(f.flagged["strangers"] for f in found),
        ),
    ]
