"""LiRA on a model that knows its rows by heart, and on one that never saw them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.audit.planted import found

from engram.audit.lira import LiRA
from engram.audit.populations import confidences
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.augment import Augment
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
    phi = confidences([memorised.model], attack.views[0], run)[0]
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


def test_several_views_of_a_row_are_averaged(memorised: Subject, run: Run) -> None:
    """One pixel to the left or right: the score is the mean over the views, and is better than that of one of them."""
    probe = LiRA(shadows=16, views=3, augment=Augment(shift=0.125, brightness=0, contrast=0))
    attack = probe._attack(memorised, memorised.rows["forget"], memorised.rows["test"], run)
    assert len(attack.views) == 3 and attack.inside is not None and attack.inside.shape == (16, 110, 3)
    assert torch.equal(attack.inside.isnan(), attack.inside[..., :1].isnan().expand(-1, -1, 3))
    moved = [view.batch(torch.arange(110)).inputs["pixel_values"] for view in attack.views]
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])
    phi = torch.stack([confidences([memorised.model], view, run)[0] for view in attack.views], -1)
    mean = lira(phi, attack.inside, attack.outside, pooled=True)
    by_view = [
        _log_ratio(phi[:, k], attack.inside[..., k], attack.outside[..., k], attack.inside, attack.outside)
        for k in range(3)
    ]
    assert mean == pytest.approx(sum(by_view) / 3)
    finding = found(probe, memorised, run)[AUC]
    assert finding.value == auc(mean[:50], mean[50:]).value and finding.protocol["views of a row"] == 3
    alone = LiRA(shadows=16)._attack(memorised, memorised.rows["forget"], memorised.rows["test"], run)
    assert alone.inside is not None and torch.equal(attack.inside[..., 0].nan_to_num(), alone.inside.nan_to_num())


def _log_ratio(
    phi: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor, *everything: torch.Tensor
) -> np.ndarray[Any, Any]:
    """One view, written out; the standard deviations are pooled over rows and views."""
    sides = []
    for one, pool in zip((inside, outside), everything, strict=True):
        sd = np.sqrt(np.nanvar(pool.numpy(), axis=0).mean())
        sides.append(-(((phi.numpy() - np.nanmedian(one.numpy(), axis=0)) / sd) ** 2) / 2 - np.log(sd))
    return np.asarray(sides[0] - sides[1])


def test_what_it_cannot_do_is_refused(memorised: Subject, numbers: Table) -> None:
    def refused(match: str, probe: LiRA | None = None, **rows: Table) -> None:
        with pytest.raises(EngramError, match=match):
            (probe or LiRA()).examine(replace(memorised, rows={**memorised.rows, **rows}))

    forget = memorised.rows["forget"]
    refused(r"audit\.LiRA is for classifiers, and the labels of the forget rows are numbers", forget=numbers)
    refused("class labels on 2 forget rows or more; 0 of 50 rows have one", forget=forget.unlabelled())
    refused("needs 4 models or more of each kind", LiRA(shadows=3))
    refused("asks about 1 view of a row or more, not 0", LiRA(views=0))
    few = {name: table.take(range(6)) for name, table in memorised.rows.items()}
    classes = torch.arange(6)
    few = {name: table.with_labels(classes) for name, table in few.items()}
    refused("18 rows of 6 classes are too few, 24 or more are needed", **few)
    with pytest.raises(EngramError, match="LiRA asks for recipe, which is not at hand"):
        LiRA().check(replace(memorised, recipe=None))
