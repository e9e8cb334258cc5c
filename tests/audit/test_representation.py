"""Planted cases for the audit of representations: what accuracy cannot see, what was destroyed, what was retrained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import nn

from engram.audit import representation
from engram.audit.accuracy import Accuracy
from engram.audit.representation import BEFORE, Reading, Representation, reading, top_related_classes
from engram.core.finding import Finding, Verdict
from engram.core.probe import Subject
from engram.data.table import MISSING, Table
from engram.engine.predict import accuracy, features, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.reproduce.are_we_truly_forgetting import (
    DOWNSTREAM,
    FORGET,
    FORGETTERS,
    INNER,
    KNN,
    LINKED,
    LOGITS,
    RECIPE,
    SPLITS,
    UNRELATED,
    World,
    beyond,
    head_only,
    scenario_gap,
)
from engram.stats.gaps import tug_of_war
from engram.stats.similarity import cka, harmonic_mean
from engram.testing import holds

BOTH = "harmonic mean of both agreements"


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(0)


@pytest.fixture(scope="module")
def by_head(world: World) -> dict[str, Finding]:
    return world.examine(lowered(world.model))


def lowered(model: nn.Module) -> nn.Module:
    """Classifier-only forgetting: the biases of the forgotten classes at -1e4."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        new.head.bias[list(LINKED)] = -1e4  # type: ignore[union-attr,operator]
    return new


def retired(model: nn.Module) -> nn.Module:
    return head_only(model, LINKED)


@holds("are-we-truly-forgetting", 2)
def test_forgotten_by_logits_and_remembered_by_the_representation(world: World, by_head: dict[str, Finding]) -> None:
    edited = lowered(world.model)
    judged = {f.name: f for f in Accuracy().examine(world.subject(edited, LINKED), world.run)}
    for name in ("forget", "test-forget"):
        found = judged[f"accuracy on {name} rows"]
        assert found.value == 0 and found.verdict == Verdict.PASS
    retained = judged["accuracy on retain rows"]
    assert retained.verdict != Verdict.FAIL and abs(beyond(retained)) < 0.03
    assert by_head[LOGITS].value > 0.9

    untouched = world.examine(world.model)
    for name in ("forget", "retain", "test", "test-forget", DOWNSTREAM):
        assert by_head[f"{BEFORE} on {name} rows"].value == pytest.approx(1, abs=1e-6)
        assert by_head[KNN.format(name)].value == untouched[KNN.format(name)].value
    for name in (FORGET, "CKA with retrained models on forget rows", KNN.format("forget"), KNN.format(DOWNSTREAM)):
        assert by_head[name].verdict == Verdict.FAIL
    assert by_head[INNER].value < min(by_head[INNER].reference) - 0.2
    assert reading(list(by_head.values())) == Reading.REMEMBERED


@holds("are-we-truly-forgetting", 2)
def test_retired_columns_hide_nothing_from_features_and_can_be_seen_in_logits(
    world: World, by_head: dict[str, Finding]
) -> None:
    """With the published features, the class scores, an edit of the classifier is partly visible."""
    new = retired(world.model)
    assert accuracy(new, world.request(LINKED).forget or Table({})) == 0
    assert world.examine(new, tables=SPLITS)[FORGET].value == by_head[FORGET].value
    by_scores = world.with_probe(layer="logits")
    seen = by_scores.examine(new, tables=SPLITS)[FORGET]
    assert seen.value < 0.9
    forget = by_scores.subject(new, LINKED).rows["forget"]
    live = list(UNRELATED)
    assert seen.value == pytest.approx(cka(predict(new, forget)[:, live], predict(world.model, forget)))


@holds("are-we-truly-forgetting", 3)
def test_an_untrained_encoder_is_destroyed(world: World) -> None:
    found = world.examine(world.fresh())
    for name in ("retain", "test"):
        collapsed = found[KNN.format(name)]
        assert collapsed.verdict == Verdict.FAIL and beyond(collapsed) < -0.3
    transferred = found[KNN.format(DOWNSTREAM)]
    assert transferred.verdict == Verdict.FAIL and beyond(transferred) < -0.15
    assert found["linear probe on features of test rows"].verdict == Verdict.FAIL
    assert reading(list(found.values())) == Reading.DESTROYED


@holds("are-we-truly-forgetting", 4)
def test_one_more_retrained_model_agrees_in_both(world: World) -> None:
    found = world.examine(RECIPE(world.subject(world.model, LINKED).rows["retain"], 99))
    assert min(found[name].value for name in (LOGITS, INNER, BOTH)) > 0.95
    assert found["CKA with retrained models on forget rows"].verdict == Verdict.PASS
    assert Verdict.FAIL not in [finding.verdict for finding in found.values()]
    assert reading(list(found.values())) in (Reading.RETRAINED, Reading.UNDECIDED)


@pytest.mark.parametrize("name", FORGETTERS)
def test_published_forgetters_look_right_by_logits_and_are_not(world: World, name: str) -> None:
    request = world.request(LINKED)
    new = FORGETTERS[name].forget(world.model, request, world.run)
    assert request.forget is not None and accuracy(new, request.forget) == 0
    found = world.examine(new, tables=SPLITS)
    assert found[LOGITS].value > 0.85
    assert found[FORGET].verdict == Verdict.FAIL and beyond(found[FORGET]) > 0.1
    assert found[INNER].value < min(found[INNER].reference) - 0.1
    assert reading(list(found.values())) == Reading.REMEMBERED


@holds("are-we-truly-forgetting", 5)
def test_forgetting_related_classes_tells_more_than_forgetting_others(world: World) -> None:
    assert scenario_gap(world, LINKED) > scenario_gap(world, UNRELATED) + 0.05
    mixed = (0, 1, 5, 6, 7)  # as random classes are
    assert scenario_gap(world, LINKED) > scenario_gap(world, mixed) + 0.03


def test_related_classes_are_those_that_the_model_sees_in_the_downstream_set(world: World) -> None:
    some = world.downstream.of_classes([3, 1])
    assert set(top_related_classes(world.model, world.downstream, 5)) == set(LINKED)
    assert set(top_related_classes(world.model, some, 2)) == {1, 3}
    chances = torch.softmax(predict(world.model, some).double(), 1).mean(0)
    assert top_related_classes(world.model, some, 10) == tuple(chances.argsort(descending=True).tolist())
    rest = top_related_classes(retired(world.model), world.downstream, 5)
    assert set(rest) == set(UNRELATED)  # a retired class is related to nothing
    with pytest.raises(EngramError, match="5 live classes; ask for 1 to 5"):
        top_related_classes(retired(world.model), world.downstream, 6)
    with pytest.raises(EngramError, match="without rows"):
        top_related_classes(world.model, world.downstream.take([]), 1)


@holds("are-we-truly-forgetting", 6)
def test_a_model_that_is_its_oracle_agrees_wholly(world: World, by_head: dict[str, Finding]) -> None:
    subject = world.subject(world.model, LINKED)
    same = replace(subject, oracles=(world.model,), recipe=None)
    found = {f.name: f for f in world.probe.examine(same, world.run)}
    assert [found[name].value for name in (LOGITS, INNER, BOTH)] == pytest.approx([1, 1, 1])
    assert found[LOGITS].reference == ()
    assert by_head[INNER].value < by_head[BOTH].value < by_head[LOGITS].value
    assert by_head[BOTH].value == pytest.approx(harmonic_mean(by_head[LOGITS].value, by_head[INNER].value))


def test_agreements_are_what_their_formulas_give(world: World, by_head: dict[str, Finding]) -> None:
    subject = world.subject(lowered(world.model), LINKED)
    oracles = [made.model for made in subject.models("oracle", 5, world.run)]
    splits = [subject.rows[name] for name in (*SPLITS, "test-forget")]
    gaps = [[accuracy(subject.model, rows) - accuracy(oracle, rows) for rows in splits] for oracle in oracles]
    assert by_head[LOGITS].value == pytest.approx(fmean(map(tug_of_war, gaps)))
    shares = []
    for k, oracle in enumerate(oracles):
        for name, rows in subject.rows.items():
            knn = by_head[KNN.format(name)]
            alike = cka(features(subject.model, rows), features(oracle, rows))
            shares.append(alike * (1 - abs(knn.value - knn.reference[k])))
    assert by_head[INNER].value == pytest.approx(fmean(shares))


def test_nearest_neighbours_are_a_vote_by_cosine(world: World) -> None:
    """Against a loop over rows; every other row has no label and takes no part."""
    gone = world.test.of_classes(LINKED)
    labels = torch.where(torch.arange(len(gone)) % 2 == 0, gone.labels, MISSING)  # type: ignore[arg-type]
    half = gone.take(labels != MISSING)
    probe, run = Representation(share=0.4), Run(seed=3)
    found = {}
    for key, table in (("some", gone.with_labels(labels)), ("half", half)):
        subject = Subject(world.model, rows={"transfer/x": table})
        found[key] = {f.name: f.value for f in probe.examine(subject, run)}
    assert found["some"] == found["half"] and len(found["half"]) == 2

    one = representation._Set("transfer/x", half, probe, run)
    x = torch.nn.functional.normalize(features(world.model, half).double(), dim=1)
    assert half.labels is not None and not set(one.held.tolist()) & set(one.bank.tolist())
    right = 0
    for row in one.held.tolist():
        order = sorted(one.bank.tolist(), key=lambda other: -float(x[row] @ x[other]))[:5]
        votes = half.labels[order].bincount(minlength=10)
        right += int(votes.argmax()) == int(half.labels[row])
    assert found["half"][KNN.format("transfer/x")] == pytest.approx(right / len(one.held))


def test_what_rows_do_not_allow_is_left_out(world: World) -> None:
    rows = {
        "forget": world.train.of_classes([3]),  # one class: nothing to tell apart
        "retain": world.train.take(range(12)),  # too few
        "test": world.test.unlabelled(),
        DOWNSTREAM: world.downstream.take(range(3)),  # no unbiased CKA of three rows
    }
    subject = Subject(world.model, before=world.model, rows=rows)
    names = [finding.name for finding in Representation().examine(subject)]
    assert names == [f"{BEFORE} on {name} rows" for name in SPLITS]


def test_a_constant_encoder_is_alike_to_nothing(world: World) -> None:
    dead = copy.deepcopy(world.model)
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
    found = world.examine(dead)
    assert found[INNER].value == 0 and found[BOTH].value == 0
    assert found[FORGET].verdict == Verdict.UNKNOWN  # there is no such CKA
    assert reading(list(found.values())) == Reading.DESTROYED


def test_an_unknown_layer_is_named(world: World) -> None:
    with pytest.raises(EngramError, match="did you mean 'logits'"):
        Representation(layer="logit").examine(world.subject(world.model, LINKED))


def finding(name: str, value: float, unit: str, reference: Sequence[float] = (0.5,) * 5) -> Finding:
    half = 0.001
    return Finding(name, value, 10**6, (value - half, value + half), unit=unit, reference=tuple(reference), margin=0.02)


KNN_TEST, CKA_BEFORE, CKA_ORACLES = KNN.format("test"), FORGET, "CKA with retrained models on test rows"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0.5, 0.5, 0.5), Reading.RETRAINED),
        ((0.5, 0.9, 0.1), Reading.REMEMBERED),
        ((0.9, 0.5, 0.5), Reading.REMEMBERED),
        ((0.1, 0.9, 0.5), Reading.REMEMBERED),
        ((0.1, 0.5, 0.1), Reading.DESTROYED),
        ((0.1, 0.1, 0.5), Reading.DESTROYED),
        ((0.5, 0.1, 0.5), Reading.DIFFERENT),
        ((0.5, 0.5, 0.1), Reading.DIFFERENT),
        ((0.52, 0.5, 0.5), Reading.UNDECIDED),
    ],
)
def test_readings_follow_from_verdicts(values: tuple[float, float, float], wanted: Reading) -> None:
    names = ((KNN_TEST, "accuracy"), (CKA_BEFORE, "CKA"), (CKA_ORACLES, "CKA"))
    found = [finding(name, value, unit) for (name, unit), value in zip(names, values, strict=True)]
    plain = Finding(LOGITS, 0.1, 10, unit="agreement", reference=(0.9,) * 5)
    assert reading(found) == reading([*found, plain]) == wanted
    assert reading([]) == reading([plain]) == Reading.UNDECIDED
    few = [replace(f, reference=f.reference[:4]) for f in found]
    assert reading(few) == Reading.UNDECIDED
