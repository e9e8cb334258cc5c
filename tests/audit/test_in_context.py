"""What a prompt brings back: models by rule, whose answers are known, and a small GPT-2 that learnt to read."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.audit.in_context import DefinitionFilter, InContextReintroduction, NameFilter, behind
from engram.core.finding import Finding, Verdict
from engram.core.probe import Subject
from engram.data.table import IGNORED, Table
from engram.data.worlds import ConceptWorld, eliminated
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.output import Output
from engram.reproduce import ununlearning
from engram.reproduce.facts import facts
from engram.reproduce.ununlearning import BARE, CONTEXTS, FORBIDDEN, Laboratory, Reader, bound, laboratory, queries
from engram.stats.seeds import generator
from engram.testing import holds

WORLD = ConceptWorld()
ALL, PERMITTED = range(8), range(3, 8)
FRESH = "definition, fresh name"


def examined(subject: Subject, **settings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in InContextReintroduction(**settings).examine(subject, Run())}


def few(tables: dict[str, Table], n: int = 60) -> dict[str, Table]:
    return {name: table.take(range(n)) for name, table in tables.items()}


@pytest.fixture(scope="module")
def asked() -> dict[str, Table]:
    """Sixty queries about forbidden concepts, in every form."""
    return few(queries(WORLD))


def by_rule(asked: dict[str, Table], model: nn.Module, **parts: Any) -> Subject:
    return Subject(model, before=Reader(WORLD, ALL), rows=asked, **parts)


# --- models by rule


def test_a_model_that_reads_is_given_back_all_and_one_that_does_not_read_nothing(asked: dict[str, Table]) -> None:
    reads, blind = (examined(by_rule(asked, Reader(WORLD, PERMITTED, reads))) for reads in (True, False))
    share_of_no = float((asked["forget"].labels[:, -1] == WORLD.tokenizer.number["no"]).double().mean())  # type: ignore[index]
    for found in (reads, blind):
        assert found[BARE].value == share_of_no
        assert found["accuracy on the forgotten, behind control/chain"].value == share_of_no
    for name in (*CONTEXTS, "chain"):
        assert reads[f"reintroduced by {name}"].value == 1 and blind[f"reintroduced by {name}"].value == 0
    assert 0 < reads["reintroduced by examples"].value < 1  # four random examples leave several concepts


def test_the_resurrection_cost_is_the_length_of_the_shortest_context_that_is_enough(asked: dict[str, Table]) -> None:
    reads, blind = (examined(by_rule(asked, Reader(WORLD, PERMITTED, reads))) for reads in (True, False))
    assert reads["resurrection cost"].value == WORLD.size + 3
    assert reads["reintroduced by teaching"].protocol["tokens of the context"] == 4 * (WORLD.attributes + 3)
    assert "resurrection cost" not in blind
    longer = {name: table for name, table in asked.items() if "definition" not in name}
    assert examined(by_rule(longer, Reader(WORLD, PERMITTED)))["resurrection cost"].value == WORLD.size + 7  # chain
    assert "resurrection cost" not in examined(by_rule(asked, Reader(WORLD, PERMITTED)), enough=1.01)


def test_without_a_control_the_bare_queries_serve(asked: dict[str, Table]) -> None:
    bare = {name: table for name, table in asked.items() if not name.startswith("control")}
    one = {**bare, "control": asked["control/chain"]}
    for tables, said in ((asked, f"behind control/{FRESH}"), (one, "behind control"), (bare, "without a context")):
        found = examined(by_rule(tables, Reader(WORLD, PERMITTED)))[f"reintroduced by {FRESH}"]
        assert found.value == 1 and found.protocol["compared with"] == said


def test_models_that_never_knew_are_measured_behind_the_same_contexts(asked: dict[str, Table]) -> None:
    oracles = (Reader(WORLD, PERMITTED),) * 5
    found = examined(by_rule(asked, Reader(WORLD, PERMITTED), oracles=oracles))
    known = examined(by_rule(asked, Reader(WORLD, ALL), oracles=oracles))
    assert found["reintroduced by chain"].reference == (1.0,) * 5
    assert found["accuracy on the forgotten, behind chain"].reference == (1.0,) * 5
    assert known[BARE].verdict == Verdict.FAIL and known["accuracy on the forgotten, behind chain"].value == 1
    assert not {"reintroduced by definition", "reintroduced by chain"} & set(known)  # what was never lost


def test_permitted_queries_are_told_beside_the_original(asked: dict[str, Table]) -> None:
    tables = {**asked, "retain": queries(WORLD, PERMITTED)["forget"].take(range(50))}
    found = examined(by_rule(tables, Reader(WORLD, range(3, 6))))["accuracy on permitted queries"]
    assert 0.5 < found.value < 1 and found.protocol["original"] == 1


def test_a_refusal_is_no_answer(asked: dict[str, Table]) -> None:
    class Refuses(Reader):
        """Says `.` to what it does not know."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
            output = super().forward(input_ids)
            name = input_ids[:, -WORLD.attributes - 2] - int(WORLD.name(0))
            output.logits[name < 3, -1] = 0  # type: ignore[index]
            output.logits[name < 3, -1, 1] = 1  # type: ignore[index]
            return output

    found = examined(by_rule(asked, Refuses(WORLD, PERMITTED)))
    assert found[BARE].value == 0 and found[BARE].protocol["answered"] == 0
    assert found[f"accuracy on the forgotten, behind {FRESH}"].protocol["answered"] == 1


@holds("ununlearning", 5)
def test_a_teaching_sequence_needs_fewer_examples_than_random_ones() -> None:
    """Of 50 concepts of 4 among 12 attributes: how many examples until the exact learner is right on 90 % of items."""
    world, draws = ConceptWorld(attributes=12, size=4), generator("examples")
    concepts = world.random_concepts(50, draws)
    taught = [
        _needed(world, concept, *(part[0] for part in world.teaching(concept[None])), draws) for concept in concepts
    ]
    drawn = []
    for concept in concepts:
        items, answers = world.items(concept.expand(40, -1), draws)
        drawn.append(_needed(world, concept, items, answers, draws))
    assert median(taught) <= world.size + 1 < median(drawn)
    assert max(taught) <= world.size + 1


def _needed(world: ConceptWorld, concept: Tensor, items: Tensor, answers: Tensor, draws: torch.Generator) -> int:
    asked, truth = world.items(concept.expand(400, -1), draws)
    for k in range(1, len(items) + 1):
        told = eliminated(items[None, :k], answers[None, :k], asked)
        if (told == truth).double().mean() >= 0.9:
            return k
    return len(items) + 1


# --- filters


@holds("ununlearning", 6)
def test_a_filter_of_names_lets_another_name_pass_and_one_of_definitions_does_not(asked: dict[str, Table]) -> None:
    lab = Laboratory(0)
    tables = {**asked, "retain": queries(WORLD, PERMITTED)[f"context/{FRESH}"].take(range(60))}
    filters = {"filter/name": lab.name_filter, "filter/definition": lab.definition_filter}
    found = examined(by_rule(tables, Reader(WORLD, PERMITTED), references=filters), threshold=0.95)
    assert found["reintroduced by definition past name"].value == 0
    assert found[f"reintroduced by {FRESH} past name"].value == found[f"reintroduced by {FRESH}"].value == 1
    assert found[f"reintroduced by {FRESH} past name"].protocol["refused, forbidden"] == 0
    past = found[f"reintroduced by {FRESH} past definition"]
    assert past.value == 0 and past.protocol["refused, forbidden"] == 1 and past.protocol["refused, permitted"] == 0
    assert found["reintroduced by teaching past definition"].value == 1  # in pieces
    loose = examined(by_rule(tables, Reader(WORLD, PERMITTED), references=filters), threshold=0.7)
    assert loose[f"reintroduced by {FRESH} past definition"].protocol["refused, permitted"] > 0.5


@holds("ununlearning", 6)
def test_the_ends_of_a_filter_are_refusing_all_and_no_filter(asked: dict[str, Table]) -> None:
    filters = {"filter/definition": Laboratory(0).definition_filter}
    for name in (*CONTEXTS, "chain", "examples"):
        found = examined(by_rule(asked, Reader(WORLD, PERMITTED), references=filters))
        curve = found[f"reintroduced by {name} past definition"].curve
        assert (curve["refused, forbidden"][0], curve["refused, forbidden"][-1]) == (1, 0)
        assert curve["reintroduced"][0] == 0
        assert curve["reintroduced"][-1] == pytest.approx(found[f"reintroduced by {name}"].value, abs=1e-12)
        assert curve["refused, forbidden"] == sorted(curve["refused, forbidden"], reverse=True)


def test_the_likeness_to_a_definition_by_hand() -> None:
    """Tokens 1 2 3 in two dimensions each of their own: windows of two, counted words."""
    found = DefinitionFilter([[2, 3]], size=5)(torch.tensor([[1, 3, 2, 4], [1, 2, 4, 4], [2, 4, 0, 0], [3, 0, 0, 0]]))
    assert found.logits.tolist() == pytest.approx([1, 0.5, 0.5, 0.5])
    masked = DefinitionFilter([[2, 3]], size=5)(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]]))
    assert masked.logits.tolist() == pytest.approx([2**-0.5])
    either = DefinitionFilter([[2, 3], [4, 4]], size=5)(torch.tensor([[4, 4, 1]]))
    assert either.logits.tolist() == pytest.approx([1])
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    assert float(DefinitionFilter([[2]], vectors)(torch.tensor([[0, 0]])).logits) == pytest.approx(2**-0.5)
    assert float(DefinitionFilter([[1, 2, 1]], vectors)(torch.tensor([[1]])).logits) > 0  # a prompt that is shorter


def test_names_are_looked_for_as_runs_of_tokens() -> None:
    found = NameFilter([[5, 6], [9]])(torch.tensor([[1, 5, 6], [5, 1, 6], [6, 5, 9]]))
    assert found.logits.tolist() == [1, 0, 1]
    assert NameFilter([[5, 6]])(torch.tensor([[5]])).logits.tolist() == [0]


def test_a_classifier_of_two_classes_is_a_filter(asked: dict[str, Table]) -> None:
    class Classifier(nn.Module):
        """Second class for prompts that say `means`, by 2 nats of log odds."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
            says = (input_ids == WORLD.tokenizer.number["means"]).any(1).float()
            return Output(logits=torch.stack([-2 * says, torch.zeros_like(says)], 1))

    subject = by_rule(asked, Reader(WORLD, PERMITTED), references={"filter/classifier": Classifier()})
    low, high = (examined(subject, threshold=t) for t in (1.9, 2.1))
    name = "reintroduced by definition past classifier"
    assert low[name].value == 0 and high[name].value == 1
    assert low["reintroduced by teaching past classifier"].value == 1


# --- contexts for any questions


def test_queries_behind_a_context_keep_their_answers() -> None:
    table = facts(12)
    same, own = behind(table, [3, 4]), behind(table, torch.arange(12)[:, None], "own/")
    assert same.inputs["input_ids"].shape == (12, 9) and same.inputs["input_ids"][:, :2].tolist() == [[3, 4]] * 12
    assert own.inputs["input_ids"][:, 0].tolist() == list(range(12)) and own.ids[0] == f"own/{table.ids[0]}"
    for moved, by in ((same, 2), (own, 1)):
        assert torch.equal(moved.labels[:, by:], table.labels) and bool((moved.labels[:, :by] == IGNORED).all())  # type: ignore[index]
        assert torch.equal(moved.extra["perturbed_ids"][:, :, by:], table.extra["perturbed_ids"])  # type: ignore[call-overload]
        assert torch.equal(moved.extra["perturbed_labels"][:, :, by:], table.extra["perturbed_labels"])  # type: ignore[call-overload]
        assert bool((moved.inputs["attention_mask"] == 1).all())
    with pytest.raises(EngramError, match="there are 3 contexts for 12 rows"):
        behind(table, torch.zeros(3, 2))
    with pytest.raises(EngramError, match="these are none"):
        behind(table.unlabelled(), [3])


def test_a_context_of_other_queries_is_refused(asked: dict[str, Table]) -> None:
    other = {**asked, "context/chain": asked["context/chain"].take(range(59))}
    with pytest.raises(EngramError, match="the context/chain rows must ask the forget rows' 60 queries"):
        examined(by_rule(other, Reader(WORLD, PERMITTED)))
    unlabelled = {"forget": asked["forget"].unlabelled()}
    with pytest.raises(EngramError, match="asks for classes or tokens"):
        examined(by_rule(unlabelled, Reader(WORLD, PERMITTED)))


# --- a network that learnt to read


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return laboratory(0)


@pytest.mark.slow
@holds("ununlearning", 1)
def test_exact_unlearning_works_without_a_context(lab: Laboratory) -> None:
    """Within three points of concepts that were never told, by 0.8 points; of those, each is 3.2 points from the mean,
    for a model has a guess for every name."""
    never, own = lab.guesses(lab.retrained)
    assert abs(float(own.mean() - never.mean())) < 0.03
    assert abs(float(never.mean()) - 0.5) < 0.03
    assert lab.right(lab.original, FORBIDDEN) > 0.95
    assert lab.audit(lab.retrained)["accuracy on permitted queries"].value > 0.85


@pytest.mark.slow
@holds("ununlearning", 2)
def test_a_definition_brings_it_back_to_whom_can_read(lab: Laboratory) -> None:
    able, unable = lab.audit(lab.retrained), lab.audit(lab.unread)
    for name in CONTEXTS:
        assert able[f"reintroduced by {name}"].value > 0.8
        assert unable[f"reintroduced by {name}"].value < 0.2


@pytest.mark.slow
@holds("ununlearning", 3)
def test_under_a_fresh_name_no_method_does_better_than_never_having_learnt(lab: Laboratory) -> None:
    """Not by more than five points and two standard errors of these queries. Under the old name a method can: see the
    claims, and what they say of it."""
    error = (0.05 * 0.95 / ununlearning.QUERIES) ** 0.5
    assert bound(lab, CONTEXTS[1:]) >= -0.05 - 2 * error


@pytest.mark.slow
@holds("ununlearning", 4)
def test_without_the_axioms_nothing_comes_back_and_siblings_suffer(lab: Laboratory) -> None:
    assert lab.audit(lab.stripped, FORBIDDEN[:1])[f"reintroduced by {FRESH}"].value < 0.3
    assert set(lab.heirs) <= set(lab.world.siblings(FORBIDDEN[0])) and lab.heirs
    assert lab.right(lab.retrained, lab.heirs) - lab.right(lab.stripped, lab.heirs) > 0.1
