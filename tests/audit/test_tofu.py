"""TOFU's figures from a log small enough to compute by hand; the probe on models that know, never knew, or forgot."""

from __future__ import annotations

import copy
import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import engram.audit
from engram.audit import forget_quality, ks_statistic, model_utility
from engram.audit.tofu import SECTIONS, TOFU, evaluate, log_truth_ratio
from engram.core.finding import Finding, Verdict
from engram.core.probe import Subject
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.reproduce.facts import SmallGPT2, facts
from engram.stats.text import rouge_l
from engram.testing import holds

Log = dict[str, dict[str, dict[str, Any]]]


def section(right: list[float], said: list[float], wrong: list[list[float]], rouge: list[float]) -> dict[str, Any]:
    """A section from probabilities."""
    columns = {
        "avg_gt_loss": [-math.log(p) for p in right],
        "avg_paraphrased_loss": [-math.log(p) for p in said],
        "average_perturb_loss": [[-math.log(p) for p in row] for row in wrong],
        "rougeL_recall": rouge,
    }
    return {name: {str(k): value for k, value in enumerate(values)} for name, values in columns.items()}


@pytest.fixture
def log() -> Log:
    return {
        # R: arithmetic (.1 + .4) / 2 / .5 = .5, geometric .2 / .5 = .4; both 2 in the second item
        "eval_log.json": section([0.8, 0.4], [0.5, 0.1], [[0.1, 0.4], [0.2, 0.2]], [1.0, 0.5]),
        # probability .5 / (.5 + .2 + .3) = .5; R .5 and .5 * sqrt(.24) / .25
        "eval_real_author_wo_options.json": section([0.5], [0.5], [[0.2, 0.3]], [0.5]),
        # probability .3 / (.3 + .1 + .1 + .1) = .5; R 1 / 3 both ways
        "eval_real_world_wo_options.json": section([0.3], [0.3], [[0.1, 0.1, 0.1]], [1.0]),
        "eval_log_forget.json": section([0.9, 0.2], [0.5, 0.1], [[0.1, 0.4], [0.2, 0.2]], [1.0, 0.0]),
    }


@holds("npo", 5)
def test_model_utility_by_hand(log: Log) -> None:
    geometric = 1 - math.sqrt(0.06) / 0.5
    nine = [0.6, 0.75, (0.5 + 0) / 2, 0.5, 0.5, 0.5, 0.5, 1.0, 2 / 3]
    assert model_utility(log, "arithmetic") == pytest.approx(9 / sum(1 / x for x in nine), rel=1e-12)
    assert model_utility(log) == model_utility(log, "arithmetic")
    nine[2], nine[5] = (0.6 + 0) / 2, geometric
    assert model_utility(log, truth_ratio="geometric") == pytest.approx(9 / sum(1 / x for x in nine), rel=1e-12)


@holds("npo", 5)
def test_forget_quality_by_hand() -> None:
    """Four ratios a side; where the fourth of one side is below the second of the other, the distribution functions are
    3/4 apart, and so are they, or farther, in 16 of the 70 orders that 4 and 4 values can stand in."""

    def ratios(values: list[float]) -> Log:
        wrong = [[0.01 * r, 0.01 * r] for r in values]
        return {"eval_log_forget.json": section([0.5] * len(values), [0.01] * len(values), wrong, [0.0] * len(values))}

    one, other = ratios([1, 2, 3, 4]), ratios([3.5, 4.5, 5, 6])
    assert ks_statistic(one, other) == pytest.approx(0.75)
    orders = [_distance(chosen) for chosen in _halves(8, 4)]
    assert len(orders) == 70
    assert forget_quality(one, other) == pytest.approx(sum(d >= 0.75 for d in orders) / 70, rel=1e-9)
    assert forget_quality(one, other) == pytest.approx(16 / 70, rel=1e-9)


def _halves(n: int, k: int) -> list[set[int]]:
    return [{i for i in range(n) if mask >> i & 1} for mask in range(2**n) if mask.bit_count() == k]


def _distance(chosen: set[int]) -> float:
    """The KS statistic where one sample has these places of the joint order, and the other the rest."""
    place = distance = 0.0
    for i in range(8):
        place += 0.25 if i in chosen else -0.25
        distance = max(distance, abs(place))
    return distance


STEPS = st.integers(1, 256).map(lambda k: k / 64)  # sums and differences are exact, so that no tie is made or lost


@holds("npo", 6)
@given(
    st.lists(STEPS, min_size=2, max_size=12, unique=True),
    st.lists(STEPS, min_size=2, max_size=12, unique=True),
)
def test_forget_quality_does_not_depend_on_which_way_round_the_ratio_is(one: list[float], other: list[float]) -> None:
    def losses(values: list[float], sign: int) -> Log:
        part = {"avg_gt_loss": 5.0, "avg_paraphrased_loss": 5.0}
        items = [str(k) for k in range(len(values))]
        wrong = {item: [5.0 + sign * value] for item, value in zip(items, values, strict=True)}
        return {
            "eval_log_forget.json": {
                **{name: dict.fromkeys(items, loss) for name, loss in part.items()},
                "average_perturb_loss": wrong,
            }
        }

    found = forget_quality(losses(one, 1), losses(other, 1))
    assert forget_quality(losses(one, -1), losses(other, -1)) == pytest.approx(found, rel=1e-9)
    assert forget_quality(losses(one, 1), losses(one, 1)) == 1


def test_a_log_may_be_the_path_of_its_json(log: Log, tmp_path: Path) -> None:
    place = tmp_path / "log.json"
    place.write_text(json.dumps(log))
    assert model_utility(place) == model_utility(str(place)) == model_utility(log)
    assert forget_quality(place, log) == 1
    with pytest.raises(EngramError, match=r"nowhere\.json cannot be read"):
        model_utility(tmp_path / "nowhere.json")


def test_without_a_paraphrase_the_plain_answer_serves(log: Log) -> None:
    del log["eval_real_world_wo_options.json"]["avg_paraphrased_loss"]
    assert model_utility(log) > 0
    assert log_truth_ratio(log, "facts").tolist() == pytest.approx([math.log(1 / 3)])


def test_items_are_matched_by_name_and_not_by_place(log: Log) -> None:
    turned = copy.deepcopy(log)
    part = turned["eval_log.json"]
    part["average_perturb_loss"] = dict(reversed(part["average_perturb_loss"].items()))
    assert model_utility(turned) == model_utility(log)


def test_a_score_of_zero_leaves_no_utility_and_huge_losses_no_overflow(log: Log) -> None:
    log["eval_log.json"]["rougeL_recall"] = {"0": 0.0, "1": 0.0}
    assert model_utility(log) == 0
    ruined = copy.deepcopy(log)
    for part in ruined.values():
        part["avg_gt_loss"] = dict.fromkeys(part["avg_gt_loss"], 5e3)
        part["avg_paraphrased_loss"] = dict.fromkeys(part["avg_paraphrased_loss"], 5e3)
    assert model_utility(ruined) == 0
    assert 0 < forget_quality(ruined, log) < 1


def test_what_a_log_lacks_is_named(log: Log) -> None:
    with pytest.raises(EngramError, match="unknown truth_ratio 'geometrical'"):
        model_utility(log, "geometrical")
    broken = copy.deepcopy(log)
    broken["eval_log.json"]["avg_gt_loss"]["1"] = math.nan
    with pytest.raises(EngramError, match=r"avg_gt_loss of item 1 in eval_log\.json"):
        model_utility(broken)
    short = copy.deepcopy(log)
    del short["eval_log.json"]["rougeL_recall"]["1"]
    with pytest.raises(EngramError, match="2 items, and rougeL_recall of 1"):
        model_utility(short)
    del log["eval_real_world_wo_options.json"]
    with pytest.raises(EngramError, match=r"eval_real_world_wo_options\.json"):
        model_utility(log)


def test_names_are_found_where_they_are_looked_for() -> None:
    assert {"model_utility", "forget_quality", "ks_statistic"} <= set(dir(engram.audit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engram.audit.nothing  # noqa: B018


# --- evaluating a model


def test_recall_is_of_the_longest_common_subsequence() -> None:
    assert rouge_l([1, 9, 2, 8, 3], [1, 2, 3, 4]) == 0.75
    assert rouge_l([4, 3, 2, 1], [1, 2, 3, 4]) == 0.25
    assert rouge_l([], [1]) == 0
    assert rouge_l([5, 5, 5], [5]) == 1


class Chain(nn.Module):
    """A language model in which the next token depends on the last one alone, by given chances [V, V]."""

    def __init__(self, chances: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(chances.log())
        self.config = SimpleNamespace(eos_token_id=0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        from engram.models.output import Output

        return Output(logits=self.scores[input_ids])


def test_an_evaluation_by_hand() -> None:
    """Question 4; true answer `1 0`, wrong ones `2 0` and `3 2 0`, 0 ends."""
    chances = torch.full((5, 5), 0.05)
    chances[4] = torch.tensor([0.1, 0.3, 0.4, 0.1, 0.1])
    chances[1] = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    chances[2] = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    chances[3] = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2])
    wrong = torch.tensor([[[4, 2, 0, 0], [4, 3, 2, 0]]])
    asked = torch.tensor([[[-100, 2, 0, -100], [-100, 3, 2, 0]]])
    table = Table(
        {"input_ids": torch.tensor([[4, 1, 0, 0]])},
        torch.tensor([[-100, 1, 0, -100]]),
        ("item",),
        {"perturbed_ids": wrong, "perturbed_labels": asked},
    )
    found = evaluate(Chain(chances), {"forget": table})[SECTIONS["forget"]]
    assert found["avg_gt_loss"]["item"] == pytest.approx(-math.log(0.3 * 0.6) / 2, rel=1e-6)
    assert found["avg_paraphrased_loss"] == found["avg_gt_loss"]
    assert found["average_perturb_loss"]["item"] == pytest.approx(
        [-math.log(0.4 * 0.5) / 2, -math.log(0.1 * 0.2 * 0.5) / 3], rel=1e-6
    )
    assert found["rougeL_recall"]["item"] == 0  # the likeliest answer is `2`
    with_paraphrase = table.with_column("paraphrased_ids", torch.tensor([[4, 2, 1, 0]])).with_column(
        "paraphrased_labels", torch.tensor([[-100, 2, 1, 0]])
    )
    again = evaluate(Chain(chances), {"forget": with_paraphrase})[SECTIONS["forget"]]
    assert again["avg_paraphrased_loss"]["item"] == pytest.approx(-math.log(0.4 * 0.2 * 0.6) / 3, rel=1e-6)


def test_a_class_is_an_answer_of_one_token() -> None:
    class Fixed(nn.Module):
        def forward(self, values: Tensor) -> Any:
            from engram.models.output import Output

            rows = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.7, 0.0]])
            return Output(logits=rows[values[:, 0].long()].log())

    table = Table({"values": torch.tensor([[0.0], [1.0]])}, torch.tensor([0, 1]))
    log = evaluate(Fixed(), {"retain": table, "forget": table})
    assert log[SECTIONS["retain"]]["rougeL_recall"] == {"0": 1.0, "1": 0.0}
    assert np.exp(log_truth_ratio(log, "forget", "arithmetic")).tolist() == pytest.approx([0.5, 2.0], rel=1e-5)
    assert np.exp(log_truth_ratio(log, "forget", "geometric")) == pytest.approx(
        [math.sqrt(0.06) / 0.5, math.sqrt(0.07) / 0.2]
    )


def test_token_rows_without_wrong_answers_are_refused() -> None:
    table = facts(12)
    bare = Table(table.inputs, table.labels, table.ids)
    with pytest.raises(EngramError, match="the forget rows hold no wrong answers; add the columns perturbed_ids"):
        evaluate(Chain(torch.full((40, 40), 1 / 40)), {"forget": bare})


@pytest.mark.skipif(find_spec("rouge_score") is None, reason="rouge-score is not installed (the extra `language`)")
def test_words_are_compared_by_their_stems(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[end]", "where", "she", "writes", "wrote", "writing", "books", "a", "book"]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[end]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[end]").save_pretrained(tmp_path)
    # asked `where`: told `she writing a book`, true answer `she writes books`
    chain = torch.full((9, 9), 0.01)
    for before, after in ((1, 2), (2, 5), (5, 7), (7, 8), (8, 0)):
        chain[before, after] = 0.9
    table = Table(
        {"input_ids": torch.tensor([[1, 2, 3, 6, 0, 0, 0]])},
        torch.tensor([[-100, 2, 3, 6, 0, -100, -100]]),
        ("item",),
        {"perturbed_ids": torch.tensor([[[1, 4, 0]]]), "perturbed_labels": torch.tensor([[[-100, 4, 0]]])},
    )
    model = Chain(chain)
    by_word, by_token = (
        evaluate(model, {"retain": table}, tokenizer=name)[SECTIONS["retain"]]["rougeL_recall"]["item"]
        for name in (str(tmp_path), None)
    )
    assert by_word == 1  # she, write, book
    assert by_token == pytest.approx(1 / 3)


# --- the probe


FACTS, GONE = 40, 10


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(seed=2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    table, recipe = facts(FACTS), SmallGPT2(FACTS)
    gone = table.take(range(GONE))
    rows = {"forget": gone, "retain": table.without(gone.ids)}
    return Subject(recipe(table, 0), request=Request.of_records(table, gone.ids), rows=rows, recipe=recipe)


def examined(subject: Subject, model: nn.Module, run: Run) -> dict[str, Finding]:
    other = Subject(model, request=subject.request, rows=subject.rows, recipe=subject.recipe)
    return {finding.name: finding for finding in TOFU(oracles=5).examine(other, run)}


def test_a_model_that_still_knows_is_told_from_those_that_never_did(subject: Subject, run: Run) -> None:
    found = examined(subject, subject.model, run)
    assert found["forget quality"].value < 1e-4
    assert found["forget quality"].protocol["statistic"] == 1
    assert found["probability of the answer on forget rows"].verdict == Verdict.FAIL
    assert found["ROUGE-L recall on forget rows"].verdict == Verdict.FAIL
    assert found["ROUGE-L recall on retain rows"].verdict == Verdict.PASS
    assert found["model utility"].value > 0.95 and found["model utility"].verdict == Verdict.NONE


def test_a_retrained_model_is_as_good_as_the_oracles(subject: Subject, run: Run) -> None:
    found = examined(subject, SmallGPT2(FACTS)(subject.rows["retain"], 99), run)
    assert found["forget quality"].value > 0.05
    assert found["ROUGE-L recall on forget rows"].verdict != Verdict.FAIL
    assert found["probability of the answer on retain rows"].verdict == Verdict.PASS


def test_a_model_in_ruins_has_no_utility_whatever_its_forget_quality(subject: Subject, run: Run) -> None:
    ruin = copy.deepcopy(subject.model)
    with torch.no_grad():
        for p in ruin.parameters():
            p.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    assert examined(subject, ruin, run)["model utility"].value < 0.05


def test_the_log_agrees_with_the_losses_of_the_engine(subject: Subject) -> None:
    table = subject.rows["retain"]
    log = evaluate(subject.model, {"retain": table})[SECTIONS["retain"]]
    assert list(log["avg_gt_loss"]) == list(table.ids)
    assert list(log["avg_gt_loss"].values()) == pytest.approx(predict(subject.model, table, "loss").tolist(), rel=1e-5)
    assert set(log["rougeL_recall"].values()) == {1.0}


def test_without_oracles_there_is_no_forget_quality(subject: Subject, run: Run) -> None:
    alone = Subject(subject.model, rows={name: rows.take(range(4)) for name, rows in subject.rows.items()})
    found = TOFU(limit=3).examine(alone, run)
    assert len(found) == 7 and {f.n for f in found} == {3}
    assert "forget quality" not in {f.name for f in found}
    unlabelled = Subject(subject.model, rows={name: rows.unlabelled() for name, rows in subject.rows.items()})
    assert TOFU().examine(unlabelled, run) == []
