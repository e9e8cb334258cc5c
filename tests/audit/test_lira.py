"""LiRA on a model that knows its rows by heart, and on one that never saw them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.audit.planted import found

from engram.audit.lira import LiRA
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.attacks import lira
from engram.stats.intervals import auc

AUC = "AUC of LiRA"


@pytest.mark.parametrize("offline", [False, True])
def test_what_was_memorised_is_told_and_what_was_not_is_not(
    memorised: Subject, retrained: Subject, run: Run, offline: bool
) -> None:
    probe = LiRA(shadows=16, offline=offline)
    known, gone = found(probe, memorised, run), found(probe, retrained, run)
    assert known[AUC].value > 0.9 and known[AUC].interval[0] > 0.8  # type: ignore[index]
    assert known[AUC].verdict == Verdict.FAIL
    assert abs(gone[AUC].value - 0.5) < 0.15 and gone[AUC].verdict != Verdict.FAIL
    assert len(gone[AUC].reference) == 5 and all(abs(value - 0.5) < 0.2 for value in gone[AUC].reference)
    assert known["AUC of LiRA before forgetting"].value == known[AUC].value
    assert known["AUC of LiRA before forgetting"].verdict == Verdict.NONE
    rates = [known[f"TPR of LiRA at {rate}% FPR"] for rate in ("0.1", "1")]
    assert rates[0].value <= rates[1].value and rates[1].value > 0.3
    assert gone["TPR of LiRA at 1% FPR"].value < 0.2
    assert known[AUC].n == 50 and known[AUC].protocol["variant"] == ("offline" if offline else "online")


def test_every_row_has_as_many_models_with_it_as_without(memorised: Subject, run: Run) -> None:
    attack = LiRA(shadows=16)._attack(memorised, memorised.rows["forget"], memorised.rows["test"], run)
    assert attack.inside is not None and attack.pooled
    shared = attack.inside.isnan().sum(0), attack.outside.isnan().sum(0)
    assert all((count == 8).all() for count in shared) and attack.inside.shape == (16, 110)
    sure = attack.inside.nanmean(0)[:50] - attack.outside.nanmean(0)[:50]
    assert (sure > 0).double().mean() > 0.9  # a row is told better by those that were trained on it


def test_the_value_is_that_of_the_scores(memorised: Subject, run: Run) -> None:
    attack = LiRA(shadows=16)._attack(memorised, memorised.rows["forget"], memorised.rows["test"], run)
    from engram.audit.populations import confidences

    phi = confidences([memorised.model], attack.asked, run)[0]
    score = lira(phi, attack.inside, attack.outside, pooled=True)
    assert found(LiRA(shadows=16), memorised, run)[AUC].value == auc(score[:50], score[50:]).value


def test_ids_that_recur_in_the_test_rows_do_not_matter(memorised: Subject, run: Run) -> None:
    test = memorised.rows["test"]
    same = replace(test, ids=memorised.rows["forget"].concat(memorised.rows["retain"]).ids[: len(test)])
    twin = replace(memorised, rows={**memorised.rows, "test": same})
    assert found(LiRA(shadows=16), twin, run)[AUC].value == found(LiRA(shadows=16), memorised, run)[AUC].value


def test_after_a_class_request_the_others_are_rows_of_that_class(memorised: Subject, run: Run) -> None:
    gone = memorised.rows["test"].take(range(20))
    rows = {**memorised.rows, "test-forget": gone}
    finding = found(LiRA(shadows=4, oracles=1), replace(memorised, rows=rows), run)[AUC]
    assert finding.protocol["others"] == 20 and finding.verdict == Verdict.UNKNOWN


def test_what_it_cannot_do_is_refused(memorised: Subject, numbers: Table) -> None:
    def refused(match: str, probe: LiRA | None = None, **rows: Table) -> None:
        with pytest.raises(EngramError, match=match):
            (probe or LiRA()).examine(replace(memorised, rows={**memorised.rows, **rows}))

    forget = memorised.rows["forget"]
    refused(r"audit\.LiRA is for classifiers, and the labels of the forget rows are numbers", forget=numbers)
    refused("class labels on 2 forget rows or more; 0 of 50 rows have one", forget=forget.unlabelled())
    refused("needs 4 models or more of each kind", LiRA(shadows=3))
    few = {name: table.take(range(6)) for name, table in memorised.rows.items()}
    classes = torch.arange(6)
    few = {name: table.with_labels(classes) for name, table in few.items()}
    refused("18 rows of 6 classes are too few, 24 or more are needed", **few)
    with pytest.raises(EngramError, match="LiRA asks for recipe, which is not at hand"):
        LiRA().check(replace(memorised, recipe=None))
