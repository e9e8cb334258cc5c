"""A definition in the prompt undoes exact unlearning, in a model that can read definitions; and only a filter stops it.

A small GPT-2 learns to read definitions and teaching sequences of concepts under names that mean nothing, then eight
concepts by name. The unlearned model is exact: the same training without any row that names the three forbidden
concepts. Others are trained with names alone (they cannot read definitions), without two attributes that the first
forbidden concept is made of, and by approximate unlearning. The world is smaller than a language: an item is six
attributes that are there or not. Sizes and steps were looked for on seed 100. The paper has no figures; bands are its
statements, at the thresholds that were set down before anything was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.audit.in_context import DefinitionFilter, InContextReintroduction, NameFilter
from engram.core.finding import Finding
from engram.core.probe import Subject
from engram.core.request import Records, Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import IGNORED, Batch, Table
from engram.data.worlds import ConceptWorld
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.forget.gradient_difference import GradientDifference
from engram.forget.npo import NPO
from engram.models.output import Output
from engram.reproduce.claims import Claim
from engram.reproduce.gpt2 import trained, untrained
from engram.stats.seeds import generator

FORBIDDEN = (0, 1, 2)
QUERIES = 300
CONTEXTS = ("definition", "definition, fresh name", "teaching")
BARE = "accuracy on the forgotten, without a context"
Mix = Mapping[str, int]  # kind of row -> how many in a batch


# --- rows


def rows(world: ConceptWorld, kind: str, n: int, draws: torch.Generator, named: Sequence[int], hidden: Tensor) -> Table:
    """n training rows of a kind: a concept by `name`, of those named; a random one by `definition` or `teaching` under
    a fresh name. No concept asks for a `hidden` attribute [attributes], and no item shows whether it has it."""
    if kind == "name":
        chosen = torch.tensor(named)[torch.randint(len(named), (n,), generator=draws)]
        names, concepts = world.name(chosen), world.definitions[chosen]
    else:
        names = world.name(world.concepts + torch.randint(world.fresh, (n,), generator=draws))
        concepts = world.random_concepts(n, draws, ~hidden)
    items, answers = world.items(concepts, draws)
    return world.table(names, items, answers, context(world, kind, names, concepts, draws), hidden=hidden)


def context(world: ConceptWorld, kind: str, names: Tensor, concepts: Tensor, draws: torch.Generator) -> Tensor | None:
    """What stands before queries of a kind, token ids [n, L]."""
    n = len(names)
    if kind == "definition":
        return world.define(names, concepts)
    if kind == "teaching":
        return world.examples(names, *world.teaching(concepts))
    if kind == "chain":
        return world.chain(names, world.name(torch.full((n,), world.concepts)), concepts)
    if kind == "examples":
        k = world.size + 1
        items, answers = world.items(concepts.repeat_interleave(k, 0), draws)
        return world.examples(names, items.unflatten(0, (n, k)), answers.unflatten(0, (n, k)))
    return None


def queries(world: ConceptWorld, concepts: Sequence[int] = FORBIDDEN, seed: int = 1) -> dict[str, Table]:
    """The audit's tables: queries about concepts, bare, behind every kind of context, and behind irrelevant words."""
    draws = generator("queries", world.seed, seed)
    chosen = torch.tensor(concepts).repeat(QUERIES // len(concepts))
    own, wanted = world.name(chosen), world.definitions[chosen]
    fresh = world.name(world.concepts + 1 + torch.randint(world.fresh - 1, chosen.shape, generator=draws))
    items, answers = world.items(wanted, draws)
    found = {"forget": world.table(own, items, answers)}
    for name, kind, names in (
        ("definition", "definition", own),
        ("definition, fresh name", "definition", fresh),
        ("teaching", "teaching", fresh),
        ("examples", "examples", fresh),
        ("chain", "chain", own),
    ):
        before = context(world, kind, names, wanted, draws)
        assert before is not None
        nothing = world.irrelevant(len(chosen), before.shape[1], draws)
        found[f"context/{name}"] = world.table(names, items, answers, before)
        found[f"control/{name}"] = world.table(names, items, answers, nothing)
    return found


# --- models


class Reader(nn.Module):
    """A language model by rule: it answers what it knows by name and, if it `reads`, what the prompt defines or shows
    by examples (by elimination, see `data.worlds.eliminated`); to all else it says no. [B, T, V] logits, 0 or 1."""

    def __init__(self, world: ConceptWorld, known: Iterable[int], reads: bool = True) -> None:
        super().__init__()
        self.world, self.known, self.reads = world, set(known), reads

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        logits = torch.zeros(*input_ids.shape, len(self.world.tokenizer))
        for row, tokens in enumerate(input_ids.tolist()):
            logits[row, -1, int(self.world.answer(torch.tensor(self._answer(tokens))))] = 1
        return Output(logits=logits)

    def _answer(self, tokens: list[int]) -> bool:
        """Is the item at the end of a prompt what its name says?"""
        length = self.world.attributes + 2
        name, item, before = tokens[-length], self._had(tokens[-length + 1 : -1]), tokens[:-length]
        wanted = self._read(name, before) if self.reads else None
        concept = name - int(self.world.name(0))
        if wanted is None and concept in self.known:
            wanted = self.world.definitions[concept]
        return wanted is not None and bool((item | ~wanted).all())

    def _had(self, tokens: list[int]) -> Tensor:
        """Which attributes are named, [attributes] bool."""
        return torch.isin(self.world.attribute(torch.arange(self.world.attributes)), torch.tensor(tokens))

    def _read(self, name: int, before: list[int]) -> Tensor | None:
        """What a name means by the text before the query; None where it does not say."""
        words = self.world.tokenizer
        sentences = [text.split() for text in words.decode(before).split(" . ")]
        told = {one[0]: one[2:] for one in sentences if one[1:2] == ["means"]}
        own = words.vocabulary[name]
        if own in told:
            parts = [part for word in told[own] for part in told.get(word, [word])]
            return self._had([words.number[word] for word in parts])
        size = self.world.attributes + 3
        shown = [before[k : k + size] for k in range(0, len(before), size) if before[k] == name]
        if not shown:
            return None
        positive = [self._had(one) for one in shown if one[-1] == words.number["yes"]]
        return torch.stack([torch.ones(self.world.attributes, dtype=torch.bool), *positive]).all(0)


class Laboratory:
    """The models of one seed, each trained when it is first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed, self.world, self.made = seed, ConceptWorld(seed=seed), dict[str, nn.Module]()
        self.nothing = torch.zeros(self.world.attributes, dtype=torch.bool)
        self.everything = range(self.world.concepts)
        self.permitted = [k for k in self.everything if k not in FORBIDDEN]

    def fresh(self) -> nn.Module:
        """An untrained network."""
        positions = (self.world.size + 2) * (self.world.attributes + 3)
        return untrained(self.world.tokenizer, positions, Run(seed=self.seed), width=32, heads=4, spread=0.3)

    def on(
        self, model: nn.Module, mix: Mix, steps: int, named: Sequence[int] = (), hidden: Tensor | None = None
    ) -> nn.Module:
        """A copy after so many steps on fresh rows of these kinds."""
        without = self.nothing if hidden is None else hidden

        def batches(step: int) -> list[list[Batch]]:
            draws = generator("rows", self.seed, *mix, step)
            kinds = mix.items()
            tables = [rows(self.world, kind, n, draws, named, without) for kind, n in kinds]
            return [[table.batch(torch.arange(len(table))) for table in tables]]

        return trained(copy.deepcopy(model), batches, Run(seed=self.seed), lr=5e-3, epochs=steps)

    @cached_property
    def reader(self) -> nn.Module:
        """It can read definitions and teaching sequences, and knows no concept by name."""
        begun = self.on(self.fresh(), {"definition": 64}, 300)
        return self.on(begun, {"definition": 8, "teaching": 48}, 300)

    @cached_property
    def original(self) -> nn.Module:
        """It knows all concepts by name."""
        return self.named(self.everything)

    @cached_property
    def retrained(self) -> nn.Module:
        """The same without any row that names a forbidden concept: exact unlearning."""
        return self.named(self.permitted)

    def named(self, concepts: Sequence[int]) -> nn.Module:
        """The reader, taught these concepts by name."""
        return self.on(self.reader, {"name": 96, "definition": 8, "teaching": 32}, 200, concepts)

    @cached_property
    def unread(self) -> nn.Module:
        """Exact unlearning in a model that was never shown a definition: the permitted concepts by name alone."""
        return self.on(self.fresh(), {"name": 96}, 300, self.permitted)

    @cached_property
    def axioms(self) -> Tensor:
        """Two attributes of the first forbidden concept [attributes], those that most permitted concepts do without."""
        own = self.world.definitions[FORBIDDEN[0]].nonzero()[:, 0].tolist()
        pairs = [(a, b) for a in own for b in own if a < b]
        best = max(pairs, key=lambda pair: len(self._without(pair)))
        return torch.isin(torch.arange(self.world.attributes), torch.tensor(best))

    def _without(self, attributes: Sequence[int]) -> list[int]:
        """The permitted concepts that ask for none of these attributes."""
        return [k for k in self.permitted if not bool(self.world.definitions[k][list(attributes)].any())]

    @property
    def heirs(self) -> list[int]:
        """The permitted concepts that ask for one of the axioms."""
        without = self._without(self.axioms.nonzero()[:, 0].tolist())
        return [k for k in self.permitted if k not in without]

    @cached_property
    def stripped(self) -> nn.Module:
        """Trained as the retrained model is, without anything that has to do with the two axioms."""
        rest = [k for k in self.permitted if k not in self.heirs]
        begun = self.on(self.fresh(), {"definition": 64}, 300, hidden=self.axioms)
        mix = {"name": 96, "definition": 16} if rest else {"definition": 16}
        return self.on(begun, mix, 150, rest, self.axioms)

    def unlearned(self, method: str) -> nn.Module:
        """The original after an approximate method, retained rows of all kinds at hand."""
        if method not in self.made:
            self.made[method] = methods()[method].forget(self.original, self.request, Run(seed=self.seed))
        return self.made[method]

    @cached_property
    def request(self) -> Request:
        """To forget rows that name forbidden concepts."""
        draws = generator("request", self.seed)
        parts = [
            rows(self.world, "name", 256, draws, self.permitted, self.nothing),
            rows(self.world, "definition", 128, draws, (), self.nothing),
            rows(self.world, "teaching", 128, draws, (), self.nothing),
        ]
        width = parts[-1].inputs["input_ids"].shape[1]
        retain = [_named(widened(table, width), f"retain {k}/") for k, table in enumerate(parts)]
        forget = _named(rows(self.world, "name", 128, draws, FORBIDDEN, self.nothing), "forget/")
        return Request(Records(forget.ids), forget, retain[0].concat(*retain[1:]))

    # audits

    def audit(self, model: nn.Module, concepts: Sequence[int] = FORBIDDEN, filters: bool = False) -> dict[str, Finding]:
        """What the probe finds in a model, by name."""
        found = {"filter/name": self.name_filter, "filter/definition": self.definition_filter} if filters else {}
        permitted = queries(self.world, self.permitted)
        tables = {**queries(self.world, concepts), "retain": permitted["context/definition"]}
        subject = Subject(model, before=self.original, rows=tables, references=found)
        probe = InContextReintroduction(threshold=0.9)
        return {finding.name: finding for finding in probe.examine(subject, Run())}

    @property
    def name_filter(self) -> NameFilter:
        """Refuses the names of forbidden concepts."""
        return NameFilter([[int(self.world.name(k))] for k in FORBIDDEN])

    @property
    def definition_filter(self) -> DefinitionFilter:
        """Refuses what is like the definition of a forbidden concept."""
        wanted = self.world.definitions[list(FORBIDDEN)]
        names = self.world.name(torch.tensor(FORBIDDEN))
        said = self.world.define(names, wanted)[:, 1:]  # `means attribute … .`, under whichever name
        return DefinitionFilter(said.tolist(), size=len(self.world.tokenizer))

    def guesses(self, model: nn.Module, n: int = 400) -> tuple[Tensor, Tensor]:
        """Accuracy under the forbidden names, behind words that say nothing, of every conjunction that no name stands
        for, and of the forbidden concepts' own: [names times conjunctions], [names]."""
        world, draws = self.world, generator("guesses", self.seed)
        every = world.mask(torch.combinations(torch.arange(world.attributes), world.size))
        told = {tuple(concept) for concept in world.definitions.tolist()}
        never = [concept for concept in every if tuple(concept.tolist()) not in told]
        pairs = [(k, c) for k in FORBIDDEN for c in (*never, world.definitions[k])]
        concepts = torch.stack([c for _, c in pairs]).repeat_interleave(n, 0)
        names = world.name(torch.tensor([k for k, _ in pairs]).repeat_interleave(n))
        items, answers = world.items(concepts, draws)
        table = world.table(names, items, answers, world.irrelevant(len(names), world.size + 3, draws))
        right = predict(model, table, _right, run=Run()).double().reshape(len(FORBIDDEN), -1, n).mean(2)
        return right[:, :-1].flatten(), right[:, -1]

    def right(self, model: nn.Module, concepts: Sequence[int]) -> float:
        """The share of right answers about concepts by name."""
        return float(self.audit(model, concepts)[BARE].value)


@cache
def laboratory(seed: int) -> Laboratory:
    """The models of a seed."""
    return Laboratory(seed)


def methods() -> dict[str, GradientForgetter]:
    """Approximate unlearning."""
    ascent, npo = (Optimizer("adamw", lr=lr) for lr in (5e-4, 1e-3))
    return {
        "GA+RT": GradientDifference(optimizer=ascent, epochs=5, batch_size=32, retain_ratio=4.0),
        "NPO+RT": NPO(optimizer=npo, epochs=5, batch_size=32, retain_ratio=4.0, beta=1.0),
    }


def widened(table: Table, width: int) -> Table:
    """Token rows, filled up on the right to a width; without the columns of other answers."""
    assert table.labels is not None
    more = width - table.labels.shape[1]
    inputs = {name: F.pad(value, (0, more)) for name, value in table.inputs.items()}
    return Table(inputs, F.pad(table.labels, (0, more), value=IGNORED), table.ids)


def _named(table: Table, prefix: str) -> Table:
    return Table(table.inputs, table.labels, tuple(f"{prefix}{id}" for id in table.ids))


def claims(seeds: Iterable[int]) -> list[Claim]:
    """What is known by name, what contexts bring back and to whom, and what filters stop. About 25 s a seed."""
    labs = [laboratory(seed) for seed in seeds]
    found = [lab.audit(lab.retrained, filters=True) for lab in labs]
    original = [lab.audit(lab.original)[BARE].value for lab in labs]
    nothing = [[one[f"accuracy on the forgotten, behind control/{c}"].value for c in CONTEXTS] for one in found]
    unread = [lab.audit(lab.unread) for lab in labs]
    stripped = [lab.audit(lab.stripped, FORBIDDEN[:1]) for lab in labs]
    heirs = [lab.right(lab.retrained, lab.heirs) - lab.right(lab.stripped, lab.heirs) for lab in labs]

    def back(some: list[dict[str, Finding]], name: str) -> tuple[float, ...]:
        return tuple(one[f"reintroduced by {name}"].value for one in some)

    fresh = "definition, fresh name"
    argued = "no figure; argued"
    return [
        Claim("right about forbidden concepts, original", "no figure; it knows them", (0.95, 1.0), tuple(original)),
        Claim(
            "the same, retrained without them, behind words that say nothing", "chance", (0.47, 0.53), _means(nothing)
        ),
        *(
            Claim(f"reintroduced by {name}, retrained model", argued, (0.8, 1.2), back(found, name))
            for name in CONTEXTS
        ),
        *(
            Claim(f"the same by {name}, where no definition was ever read", argued, (-0.2, 0.2), back(unread, name))
            for name in CONTEXTS
        ),
        *(
            Claim(
                f"accuracy behind {said} after approximate unlearning, less that of the retrained model; the least",
                "nothing does better than never having learnt (argued)",
                (-0.05, 0.5),
                tuple(bound(lab, contexts) for lab in labs),
            )
            for said, contexts in (
                ("contexts under fresh names", CONTEXTS[1:]),
                ("definitions under the old name", CONTEXTS[:1]),
            )
        ),
        Claim(f"reintroduced by {fresh}, two axioms never learnt", argued, (-0.3, 0.3), back(stripped, fresh)),
        Claim("accuracy that this costs other concepts of these axioms", argued, (0.1, 0.6), tuple(heirs)),
        Claim(
            f"reintroduced by {fresh}, past a filter of names, less without a filter",
            "names can be changed (argued)",
            (0.0, 0.0),
            tuple(a - b for a, b in zip(back(found, f"{fresh} past name"), back(found, fresh), strict=True)),
        ),
        Claim(f"reintroduced by {fresh}, past a filter of definitions", argued, (-0.1, 0.3), _past(found, fresh)),
        Claim("the same by teaching sequences", "harmless pieces pass (argued)", (0.8, 1.2), _past(found, "teaching")),
    ]


def bound(lab: Laboratory, contexts: Sequence[str]) -> float:
    """The least, over methods and contexts, of accuracy after approximate less after exact unlearning."""
    exact, *others = [lab.audit(model) for model in (lab.retrained, *map(lab.unlearned, methods()))]
    names = [f"accuracy on the forgotten, behind {name}" for name in contexts]
    return min(one[name].value - exact[name].value for one in others for name in names)


def _past(found: list[dict[str, Finding]], name: str) -> tuple[float, ...]:
    return tuple(one[f"reintroduced by {name} past definition"].value for one in found)


def _means(lists: list[list[float]]) -> tuple[float, ...]:
    return tuple(fmean(values) for values in lists)


def _right(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return output.logits[:, -2].argmax(1) == batch.labels[:, -1]
