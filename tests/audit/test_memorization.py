"""Verbatim memorisation: what one forward pass tells is what greedy decoding does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.audit.planted import found

from engram.audit.membership import SCORES, Membership
from engram.audit.memorization import Memorization, told
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import IGNORED, Batch, Table
from engram.engine.lm import greedy, questions
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.models.output import Output
from engram.reproduce.facts import SmallGPT2, facts

STRENGTH, EXACT = "extraction strength on forget rows", "exact memorisation on forget rows"
HALF = "answers told verbatim after 50% of them on forget rows"


@pytest.fixture(scope="module")
def longer() -> Table:
    """Rows of twelve tokens, eight of which are asked for."""
    ids = torch.randint(10, 40, (30, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(12) >= 4, ids, IGNORED)
    return Table({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


@pytest.mark.parametrize("epochs", [1, 12, 40])
def test_one_pass_tells_what_greedy_decoding_does(epochs: int, longer: Table) -> None:
    model = SmallGPT2(world=20, epochs=epochs, positions=12)(longer, 0)
    strength = told(model, longer)[:, 0]
    ids = longer.inputs["input_ids"]
    for row in range(len(longer)):
        begin = int(questions(longer.labels)[row])  # type: ignore[arg-type]
        given = next(
            k
            for k in range(9)
            if k == 8 or torch.equal(greedy(model, ids[row : row + 1, : begin + k], 8 - k)[0], ids[row, begin + k :])
        )
        assert float(strength[row]) == pytest.approx(1 - given / 8)


def test_facts_that_were_learnt_come_back_and_others_do_not(run: Run) -> None:
    world = facts()
    forget, retain = world.take(range(10)), world.take(range(10, 40))
    recipe = SmallGPT2()
    model = recipe(world, 0)
    subject = Subject(model, rows={"forget": forget, "retain": retain}, recipe=recipe)
    findings = found(Memorization(oracles=5), subject, run)
    assert findings[STRENGTH].value == findings[EXACT].value == findings[HALF].value == 1.0
    # the answer has two tokens: without the fact its end of sequence is still known
    assert max(findings[STRENGTH].reference) <= 0.6 and findings[STRENGTH].verdict == Verdict.FAIL
    oracle = recipe(retain, 77)
    assert found(Memorization(), replace(subject, model=oracle), run)[STRENGTH].verdict != Verdict.FAIL


def test_a_class_is_an_answer_of_one_token(memorised: Subject, run: Run) -> None:
    findings = found(Memorization(oracles=2), memorised, run)
    right = accuracy(memorised.model, memorised.rows["forget"])
    assert {round(f.value, 6) for f in findings.values()} == {round(right, 6)}


def test_numbers_give_no_finding(numbers: Table) -> None:
    assert Memorization().examine(Subject(torch.nn.Identity(), rows={"forget": numbers})) == []


def test_min_k_is_the_mean_of_the_least_likely_fifth() -> None:
    chances = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.8, 0.7, 0.6])
    logits = torch.zeros(1, 8, 2)
    logits[0, :7, 1] = (chances / (1 - chances)).log()
    labels = torch.tensor([[IGNORED, *[1] * 7]])
    score = SCORES["min-k"](Output(logits=logits), Batch({}, labels, torch.tensor([0])))
    assert score.item() == pytest.approx((math.log(0.1) + math.log(0.2)) / 2)  # two of seven


def test_min_k_tells_learnt_answers_from_new_ones(longer: Table, run: Run) -> None:
    half = len(longer) // 2
    members, others = longer.take(range(half)), longer.take(range(half, len(longer)))
    model = SmallGPT2(world=20, epochs=60, positions=12)(members, 0)
    subject = Subject(model, rows={"forget": members, "test": others})
    assert found(Membership(score="min-k"), subject, run)["AUC of the threshold attack"].value > 0.95
