"""Probes on planted cases: an untouched model, one more oracle, an edit of the last layer alone, a small request."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import isfinite, isnan

import pytest
import torch
from torch import nn

from engram.audit.accuracy import Accuracy
from engram.audit.membership import Membership
from engram.audit.representation import Representation
from engram.audit.retrain_gap import RetrainGap, tug_of_war
from engram.core.finding import Finding, Verdict
from engram.core.probe import Probe, Subject
from engram.core.request import Request
from engram.core.verbs import examine
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.testing import holds

Split = tuple[Table, Table]
RECIPE = Recipe({"name": "MLP", "hidden": [64]}, Optimizer(lr=3e-3), epochs=10, classes=tuple(range(10)))


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(seed=3)


@pytest.fixture(scope="module")
def subject(split: Split) -> Subject:
    """A class request, on which the model has not acted at all."""
    train, test = split
    request = Request.of_classes(train, (3,))
    assert request.forget is not None and request.retain is not None
    gone = test.of_classes([3])
    rows = {"forget": request.forget, "retain": request.retain, "test": test.without(gone.ids), "test-forget": gone}
    model = RECIPE(train, 0)
    return Subject(model, before=model, request=request, rows=rows, recipe=RECIPE)


@pytest.fixture(scope="module")
def oracle(subject: Subject) -> Subject:
    """The same request, carried out by one more retraining."""
    return _with(subject, RECIPE(subject.rows["retain"], 99))


def _with(subject: Subject, model: nn.Module) -> Subject:
    return Subject(model, before=subject.before, request=subject.request, rows=subject.rows, recipe=subject.recipe)


def found(probe: Probe, subject: Subject, run: Run) -> dict[str, Finding]:
    return {finding.name: finding for finding in probe.examine(subject, run)}


def test_an_untouched_model_fails(subject: Subject, run: Run) -> None:
    verdicts = {name: f.verdict for name, f in found(Accuracy(), subject, run).items()}
    assert verdicts["accuracy on forget rows"] == Verdict.FAIL
    assert verdicts["accuracy on test-forget rows"] == Verdict.FAIL
    gaps = found(RetrainGap(), subject, run)
    assert gaps["activation distance on forget rows"].verdict == Verdict.FAIL
    assert gaps["mean accuracy gap"].verdict == Verdict.FAIL


def test_one_more_oracle_passes_where_rows_suffice(oracle: Subject, run: Run) -> None:
    accuracies = found(Accuracy(), oracle, run)
    assert accuracies["accuracy on retain rows"].verdict == Verdict.PASS
    everything = [
        *accuracies.values(),
        *found(RetrainGap(), oracle, run).values(),
        *found(Membership(), oracle, run).values(),
    ]
    assert Verdict.FAIL not in [finding.verdict for finding in everything]
    assert found(RetrainGap(), oracle, run)["mean accuracy gap"].verdict == Verdict.PASS
    assert found(Representation(), oracle, run)["CKA with retrained models on forget rows"].verdict == Verdict.PASS


def test_few_records_are_unknown_and_say_how_many_would_do(split: Split, run: Run) -> None:
    train, test = split
    request = Request.of_records(train, train.ids[:25])
    assert request.forget is not None and request.retain is not None
    rows = {"forget": request.forget, "retain": request.retain, "test": test}
    few = Subject(RECIPE(train, 0), request=request, rows=rows, recipe=RECIPE)
    finding = found(Accuracy(rows=("forget",)), few, run)["accuracy on forget rows"]
    assert finding.verdict == Verdict.UNKNOWN
    from engram.core.verdict import judge

    assert "rows" in judge(finding).sentence


def test_without_oracles_there_is_no_verdict(subject: Subject) -> None:
    bare = Subject(subject.model, rows=subject.rows)
    verdicts = {finding.verdict for finding in Accuracy().examine(bare)}
    assert verdicts == {Verdict.UNKNOWN}


def test_what_is_not_there_is_named(subject: Subject) -> None:
    with pytest.raises(EngramError, match="Membership asks for forget"):
        Membership().check(Subject(subject.model, rows={"test": subject.rows["test"]}))


def test_a_class_that_retrained_models_never_heard_of(split: Split) -> None:
    """The last class goes, and the recipe names no classes: oracles have no column for it."""
    train, test = split
    recipe = Recipe({"name": "MLP", "hidden": [16]}, Optimizer(lr=1e-2), epochs=2)
    gone, model = train.of_classes([9]), recipe(train, 0)
    for score in ("loss", "confidence", "entropy"):
        probes = (Membership(score=score, oracles=2), RetrainGap(oracles=2))
        made = examine(
            model, forget=gone, retain=train.without(gone.ids), test=test, classes=(9,), recipe=recipe, probes=probes
        )
        assert all(len(f.reference) == 2 for f in made) and all(isfinite(f.value) for f in made)


def test_without_test_rows_of_the_class_the_others_are_all_test_rows(subject: Subject, run: Run) -> None:
    bare = replace(subject, rows={**subject.rows, "test-forget": subject.rows["test"].take([])}, recipe=None)
    finding = found(Membership(), bare, run)["AUC of the threshold attack"]
    assert finding.protocol["others"] == len(subject.rows["test"])


def test_numbers_and_missing_labels_are_refused_with_a_sentence(subject: Subject, run: Run) -> None:
    numbers = {name: t.with_labels(torch.arange(len(t))[:, None] / 9) for name, t in subject.rows.items()}
    bare = {name: t.unlabelled() for name, t in subject.rows.items()}

    def refused(probe: Probe, match: str, rows: dict[str, Table]) -> None:
        with pytest.raises(EngramError, match=match):
            probe.examine(replace(subject, rows=rows), run)

    refused(RetrainGap(), "for classifiers, and the labels of the forget rows are numbers", numbers)
    refused(Membership(score="entropy"), "for classifiers, and the labels of the forget rows are numbers", numbers)
    refused(Membership(score="confidence"), "use score='loss'", numbers)
    refused(Membership(score="min-k"), "no numbers", numbers)
    refused(Membership(), "needs labels, and no forget row has one; score='entropy' does without", bare)
    refused(RetrainGap(), "needs class labels, and no forget row has one", bare)
    refused(Representation(), "trains on labelled rows, and none of these .* has a label", bare)
    without = found(Membership(score="entropy"), replace(subject, rows=bare, recipe=None), run)
    assert without["AUC of the threshold attack"].n == len(bare["test-forget"])
    retain, forget = bare["retain"], bare["forget"]
    assert examine(subject.model, forget=forget, retain=retain, test=bare["test"], recipe=RECIPE) == []


def test_constant_features_have_no_cka_and_it_says_so(subject: Subject, run: Run) -> None:
    dead = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
    looks = found(Representation(oracles=2), _with(subject, dead), run)
    one = looks["CKA with retrained models on forget rows"]
    assert isnan(one.value) and "constant features have no CKA" in one.protocol["features"]
    assert one.verdict == Verdict.UNKNOWN


def test_membership_tells_an_overfitted_model(split: Split) -> None:
    """With random labels nothing can be known but what was memorised."""
    train, test = (table.take(range(300)) for table in split)
    draws = torch.Generator().manual_seed(1)
    train, test = (t.with_labels(torch.randint(0, 10, (300,), generator=draws)) for t in (train, test))
    model = Recipe({"name": "MLP", "hidden": [256]}, Optimizer(lr=3e-3), epochs=60)(train, 0)
    attacks = found(Membership(), Subject(model, rows={"forget": train, "test": test}), Run())
    assert attacks["AUC of the threshold attack"].value > 0.9
    assert attacks["accuracy of the logistic attack"].value > 0.8
    assert attacks["TPR at 1% FPR"].value > 0.1
    curve = attacks["AUC of the threshold attack"].curve
    assert curve["fpr"] == sorted(curve["fpr"])


def test_scores_agree_on_what_is_memorised(subject: Subject, run: Run) -> None:
    values = [found(Membership(score=score), subject, run) for score in ("loss", "confidence", "entropy")]
    aucs = [attacks["AUC of the threshold attack"].value for attacks in values]
    assert aucs[0] == pytest.approx(aucs[1])  # one is a monotone function of the other
    with pytest.raises(EngramError, match="did you mean 'loss'"):
        Membership(score="los").examine(subject, run)


@holds("are-we-truly-forgetting", 2)
def test_an_edit_of_the_last_layer_does_not_fool_the_representation(subject: Subject, run: Run) -> None:
    edited = copy.deepcopy(subject.model)
    with torch.no_grad():
        edited.head.bias[3] = -1e4  # type: ignore[union-attr,index,operator]
    case = _with(subject, edited)
    accuracies = found(Accuracy(), case, run)
    assert accuracies["accuracy on forget rows"].value == 0
    looks = found(Representation(margin=0.02), case, run)
    for rows in ("forget", "retain", "test"):
        assert looks[f"CKA with the model before forgetting on {rows} rows"].value == pytest.approx(1, abs=1e-6)
    assert looks["CKA with the model before forgetting on forget rows"].verdict == Verdict.FAIL


@holds("are-we-truly-forgetting", 3)
def test_a_fresh_encoder_is_no_retrained_one(subject: Subject, run: Run) -> None:
    fresh = RECIPE.start(subject.rows["retain"], Run(seed=8))
    looks = found(Representation(), _with(subject, fresh), run)
    name = "CKA with retrained models on retain rows"
    assert looks[name].value < min(looks[name].reference) - 0.05
    assert looks[name].verdict == Verdict.FAIL


def test_no_single_measure_lets_a_network_pass_that_was_never_trained(subject: Subject, run: Run) -> None:
    """It has forgotten all right, and everything else with it; each of the other two measures says so."""
    case = _with(subject, RECIPE.start(subject.rows["retain"], Run(seed=8)))
    verdicts = {name: f.verdict for name, f in found(Accuracy(), case, run).items()}
    accuracies = {name: f.value for name, f in found(Accuracy(), case, run).items()}
    assert accuracies["accuracy on retain rows"] < 0.3
    assert verdicts["accuracy on retain rows"] == verdicts["accuracy on test rows"] == Verdict.FAIL
    assert found(RetrainGap(), case, run)["mean accuracy gap"].verdict == Verdict.FAIL


def test_tug_of_war_as_worked_out() -> None:
    assert tug_of_war([0.02, 0.005, 0.02]) == pytest.approx(0.955598)


def test_a_model_that_is_its_oracle_has_no_gap(subject: Subject, oracle: Subject) -> None:
    same = Subject(oracle.model, rows=subject.rows, oracles=(oracle.model,))
    gaps = found(RetrainGap(oracles=1), same, Run())
    assert gaps["mean accuracy gap"].value == 0
    assert gaps["tug of war"].value == 1
    assert gaps["activation distance on forget rows"].value == 0
    assert gaps["Jensen-Shannon divergence on forget rows"].value == pytest.approx(0, abs=1e-12)


def test_oracles_are_trained_once_for_all_probes(subject: Subject) -> None:
    calls: list[int] = []

    class Counting:
        def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
            calls.append(seed)
            return RECIPE.start(table, Run(seed=seed))

        def __repr__(self) -> str:
            return "Counting()"

    case = Subject(subject.model, request=subject.request, rows=subject.rows, recipe=Counting())
    run = Run()
    for probe in (Accuracy(oracles=3), Membership(oracles=3), RetrainGap(oracles=2)):
        probe.examine(case, run)
    assert len(calls) == len(set(calls)) == 3


def test_a_look_changes_no_mode_and_no_weight(subject: Subject, run: Run) -> None:
    subject.model.train()
    before = [p.detach().clone() for p in subject.model.parameters()]
    Accuracy(oracles=2).examine(subject, run)
    Representation(oracles=2).examine(subject, run)
    assert subject.model.training
    assert all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))
    subject.model.eval()
