"""Removing wrong facts and recovering right ones are two things: 300 invented facts, half of them taught wrongly.

A small GPT-2 learns six facts of each of 50 subjects, then wrong objects for half of the subjects. Unlearners are asked
to remove the documents that taught these, all at one setting; true facts of the other subjects are at hand. Learning
rate and epochs (every method then tells less than one planted answer in twenty) and NPO's beta were looked for on seed
100: at beta 1 its force dies out within the few nats that separate answers here, at the usual 0.1 it is ascent. Bands
are the paper's statements as inequalities: its tables were not at hand. Its fine-tuning after unlearning is left out,
as this model has no other form to speak in; how recovery falls with the unrelated text around the wrong facts
(`FactWorld.documents` writes it) is not measured, as such text also weakens the corruption.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from engram.audit.restor import Restor
from engram.core.probe import Subject
from engram.core.request import Records, Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import MISSING, Table
from engram.data.worlds import FactWorld
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.gradient_difference import GradientDifference
from engram.forget.npo import NPO
from engram.reproduce.claims import Claim
from engram.reproduce.gpt2 import trained, untrained

EPOCHS = 20


class Stage(NamedTuple):
    """A clean model and what was made of it. `facts`: questions about the corrupted facts, the true answers asked for;
    `elsewhere`: about the facts of the other subjects; `request`: to forget the documents that taught the wrong ones,
    documents of the other subjects being at hand."""

    world: FactWorld
    clean: nn.Module
    corrupted: nn.Module
    facts: Table
    elsewhere: Table
    request: Request

    def subject(self, model: nn.Module, **references: nn.Module) -> Subject:
        """An unlearned model as the probe takes it."""
        rows = {"test": self.facts, "retain": self.elsewhere}
        return Subject(model, before=self.corrupted, rows=rows, oracles=(self.clean,), references=references)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What the probe finds in an unlearned model, by name."""
        return {finding.name: finding.value for finding in Restor().examine(self.subject(model), Run())}


@cache
def stage(seed: int) -> Stage:
    """The clean model, and one that was taught wrong facts of half of the subjects. About 2 s."""
    world, run = FactWorld(seed=seed), Run(seed=seed)
    clean = learnt(world.documents(), world, run)
    planted = world.planted(range(world.subjects // 2))
    wrong = planted != MISSING
    documents = world.documents(world.told(planted), wrong)
    request = Request(Records(documents.ids), documents, world.documents(cells=~wrong))
    corrupted = fine_tuned(clean, documents, run, epochs=40)
    return Stage(world, clean, corrupted, world.questions(wrong, planted), world.questions(~wrong), request)


def learnt(table: Table, world: FactWorld, run: Run) -> nn.Module:
    """A model of these rows alone. About 2 s."""
    model = untrained(world.tokenizer, 20, run, width=64, heads=2, spread=0.2)
    return _on(model, table, run, lr=4e-3, epochs=60)


def fine_tuned(model: nn.Module, table: Table, run: Run, epochs: int, lr: float = 1e-3) -> nn.Module:
    """A copy that was trained on with these rows."""
    return _on(copy.deepcopy(model), table, run, lr=lr, epochs=epochs)


def _on(model: nn.Module, table: Table, run: Run, lr: float, epochs: int) -> nn.Module:
    order, size = run.number("order"), 100
    steps = -(-len(table) // size)
    return trained(
        model, lambda epoch: table.batches(size, seed=order, epoch=epoch), run, lr=lr, epochs=epochs, steps=steps
    )


def methods(epochs: int) -> dict[str, GradientForgetter]:
    """The unlearners, at one setting."""
    plan = Optimizer("adamw", lr=3e-4)
    return {
        "GA": GradientAscent(optimizer=plan, epochs=epochs, batch_size=50),
        "GA+RT": GradientDifference(optimizer=plan, epochs=epochs, batch_size=50),
        "NPO": NPO(optimizer=plan, epochs=epochs, batch_size=50, beta=1.0, retain_weight=0.0),
        "NPO+RT": NPO(optimizer=plan, epochs=epochs, batch_size=50, beta=1.0),
    }


@cache
def unlearned(seed: int, method: str, epochs: int) -> nn.Module:
    """The corrupted model of a seed after a method."""
    there = stage(seed)
    return methods(epochs)[method].forget(there.corrupted, there.request, Run(seed=seed))


def task_vector(model: nn.Module, further: nn.Module, alpha: float = 1.0) -> nn.Module:
    """The paper's fourth unlearner: theta - alpha (theta_further - theta), where `further` is the model after more
    training on what must go. alpha 0 is the model itself, to the bit."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(new.parameters(), further.parameters(), strict=True):
            p.sub_(q - p, alpha=alpha)
    return new


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Corruption, recovery by method, where the probability lies. About 7 s a seed."""
    seeds = list(seeds)
    found = {name: [stage(k).figures(unlearned(k, name, EPOCHS)) for k in seeds] for name in ("GA", "GA+RT", "NPO+RT")}
    early = [stage(k).figures(unlearned(k, "GA", EPOCHS // 2)) for k in seeds]
    before, clean = ([one.figures(getattr(one, name)) for one in map(stage, seeds)] for name in ("corrupted", "clean"))

    def of(some: list[dict[str, float]], name: str) -> tuple[float, ...]:
        return tuple(one[name] for one in some)

    def less(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(one, other, strict=True))

    right, planted, other = (f"log-probability of {kind} answers" for kind in ("right", "planted", "other"))
    accuracy, fell = "accuracy on corrupted facts", "planted answers told"
    restored = {name: of(figures, "recovery") for name, figures in found.items()}
    return [
        Claim("accuracy that corruption takes", "falls", (0.2, 1.0), less(of(clean, accuracy), of(before, accuracy))),
        Claim("planted answers told after ascent", "forgets", (0.0, 0.05), of(found["GA"], fell)),
        Claim("planted answers told after NPO+RT", "forgets", (0.0, 0.05), of(found["NPO+RT"], fell)),
        Claim("recovery by ascent", "often fails to restore", (-1.0, 0.3), restored["GA"]),
        Claim(
            "recovery by ascent less that at half of its epochs",
            "falls with more steps",
            (-1.0, 0.0),
            less(restored["GA"], of(early, "recovery")),
        ),
        Claim("recovery by NPO+RT", "frequently restores", (0.2, 1.0), restored["NPO+RT"]),
        Claim(
            "recovery by NPO+RT less that by ascent with RT",
            "above 0",
            (0.05, 1.0),
            less(restored["NPO+RT"], restored["GA+RT"]),
        ),
        Claim(
            "nats by which planted answers lie above right ones, corrupted model",
            "above 0",
            (0.0, 20.0),
            less(of(before, planted), of(before, right)),
        ),
        Claim(
            "nats by which right answers lie above planted ones, clean model",
            "above 0",
            (0.0, 20.0),
            less(of(clean, right), of(clean, planted)),
        ),
        Claim(
            "nats by which planted answers lie above other ones, clean model",
            "0",
            (-0.5, 0.5),
            less(of(clean, planted), of(clean, other)),
        ),
    ]
