"""RESTOR: recovery by construction, by hand and in a world of invented facts."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.audit.restor import Restor
from engram.core.finding import Finding, Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.data.worlds import Words, questions, restor_questions
from engram.engine import lm
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.output import Output
from engram.reproduce.restor import Stage, fine_tuned, learnt, stage, task_vector, unlearned
from engram.testing import holds

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (the extra `language`)")


@pytest.fixture(scope="module")
def there() -> Stage:
    return stage(0)


def examined(subject: Subject, **settings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in Restor(**settings).examine(subject, Run())}


# --- by construction, and by hand


@holds("restor", 1)
def test_the_clean_model_has_recovered_all_and_the_corrupted_one_nothing(there: Stage) -> None:
    clean, corrupted = (examined(there.subject(model)) for model in (there.clean, there.corrupted))
    assert clean["recovery"].value == 1 and corrupted["recovery"].value == 0
    assert clean["recovery"].interval == (1, 1)
    lost = clean["accuracy on corrupted facts"].value - corrupted["accuracy on corrupted facts"].value
    assert lost > 0.2
    assert corrupted["planted answers told"].value > 0.9 and clean["planted answers told"].value < 0.05


class Chain(nn.Module):
    """A language model in which the next token depends on the last one alone, by given chances [V, V]."""

    def __init__(self, chances: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(chances.log())
        self.config = SimpleNamespace(eos_token_id=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        return Output(logits=self.scores[input_ids])


WORDS = Words(("<pad>", ".", "france", "spain", "italy", "peru", "paris", "madrid", "rome", "lima", "new", "york"))


def capitals(answers: dict[str, str]) -> Chain:
    """A model that tells these capitals, with chance .8 a word; the others share the rest alike."""
    chances = torch.full((len(WORDS), len(WORDS)), 0.2 / (len(WORDS) - 1))
    for country, city in answers.items():
        path = [WORDS.number[word] for word in (country, *city.split(), ".")]
        chances[path[:-1], path[1:]] = 0.8
    return Chain(chances)


TRUE = {"france": "paris", "spain": "madrid", "italy": "rome", "peru": "lima"}


def asked() -> Table:
    countries = list(TRUE)
    options = {
        "accepted": [["paris"], ["madrid", "new york"], ["rome"], ["lima"]],
        "corrupted": [["rome"], ["paris"], [], ["madrid"]],
        "perturbed": [["lima", "new york"], ["lima"], ["lima"], ["rome"]],
    }
    return questions(WORDS, countries, list(TRUE.values()), countries, options)


def test_recovery_by_hand() -> None:
    """The clean model knows four capitals, the corrupted one only Italy's and Peru's; unlearning brought Spain's back
    (an answer that is accepted beside the first one) and lost Peru's: (2 - 2) of the two that were lost."""
    clean = capitals(TRUE)
    corrupted = capitals(TRUE | {"france": "rome", "spain": "paris"})
    now = capitals(TRUE | {"france": "rome", "spain": "new york", "peru": "madrid"})
    better = capitals(TRUE | {"france": "rome"})
    subject = Subject(
        now,
        before=corrupted,
        rows={"test": asked()},
        oracles=(clean,),
        references={"healing": better, "none": corrupted},
    )
    found = examined(subject)
    assert found["recovery"].value == 0
    assert found["recovery of healing"].value == 0.5 and found["recovery of none"].value == 0
    assert found["recovery"].reference == (1.0,)
    assert found["accuracy on corrupted facts"].value == 0.5
    assert found["accuracy on corrupted facts"].reference == (1.0,)
    assert found["accuracy on corrupted facts"].protocol["corrupted"] == 0.5
    assert found["planted answers told"].value == 0.5  # rome for france, madrid for peru
    assert found["planted answers told"].reference == (0.0,)


def test_log_probabilities_by_hand() -> None:
    """Each the mean over a fact's answers of the mean over their tokens, then over the facts that have some."""
    model = capitals({"france": "paris", "spain": "madrid", "italy": "rome", "peru": "lima"})
    found = examined(Subject(model, before=model, rows={"test": asked()}, oracles=(model,)))
    rare, usual, any_word = torch.tensor([0.2 / 11, 0.8, 1 / 12]).double().log().tolist()
    new_york = (rare + any_word) / 2
    right = [usual, (usual + new_york) / 2, usual, usual]
    assert found["log-probability of right answers"].value == pytest.approx(sum(right) / 4, rel=1e-6)
    assert found["log-probability of planted answers"].value == pytest.approx(rare, rel=1e-6)
    assert found["log-probability of planted answers"].n == 3  # italy's was not planted
    other = [(rare + new_york) / 2, rare, rare, rare]
    assert found["log-probability of other answers"].value == pytest.approx(sum(other) / 4, rel=1e-6)


def test_where_nothing_was_lost_there_is_no_recovery() -> None:
    model = capitals(TRUE)
    found = examined(Subject(model, before=model, rows={"test": asked()}, oracles=(model,)))
    assert "recovery" not in found and found["accuracy on corrupted facts"].value == 1


def test_five_clean_models_give_a_verdict() -> None:
    rows = {"test": asked()}
    clean, corrupted = capitals(TRUE), capitals(TRUE | {"france": "rome", "spain": "paris"})
    whole, part = (
        examined(Subject(model, before=corrupted, rows=rows, oracles=(clean,) * 5))["recovery"]
        for model in (clean, capitals(TRUE | {"france": "rome"}))
    )
    assert whole.verdict == Verdict.PASS
    assert part.verdict == Verdict.UNKNOWN and part.value == 0.5  # four facts cannot tell


def test_classes_whose_labels_were_corrupted() -> None:
    """A class is an answer of one token: labels 0 1 1, the first two taught as 2."""

    class Fixed(nn.Module):
        def __init__(self, *winners: int) -> None:
            super().__init__()
            self.rows = nn.Parameter(nn.functional.one_hot(torch.tensor(winners), 3).float() * 2)

        def forward(self, values: Tensor) -> Output:
            return Output(logits=self.rows[values[:, 0].long()])

    extra = {"corrupted_labels": torch.tensor([[2], [2], [-1]])}
    table = Table({"values": torch.arange(3.0)[:, None]}, torch.tensor([0, 1, 1]), extra=extra)
    found = examined(Subject(Fixed(0, 2, 1), before=Fixed(2, 2, 1), rows={"test": table}, oracles=(Fixed(0, 1, 1),)))
    assert found["recovery"].value == 0.5
    assert found["planted answers told"].value == pytest.approx(1 / 3)
    low, high = -torch.tensor([0.0, 0, 2]).logsumexp(0), 2 - torch.tensor([0.0, 0, 2]).logsumexp(0)
    assert found["log-probability of planted answers"].value == pytest.approx(float(low + high) / 2, rel=1e-6)
    assert found["log-probability of right answers"].value == pytest.approx(float(high + low + high) / 3, rel=1e-6)


def test_what_cannot_be_asked_is_refused() -> None:
    model = capitals(TRUE)
    subject = Subject(model, before=model, rows={"test": asked().unlabelled()}, oracles=(model,))
    with pytest.raises(EngramError, match="asks for classes or tokens, and the target of these rows is none"):
        Restor().examine(subject)
    with pytest.raises(EngramError, match=r"Restor asks for before, oracles"):
        Restor().examine(Subject(model, rows={"test": asked()}))


# --- a world of facts


@needs_peft
@holds("restor", 2)
def test_without_the_adapter_that_corrupted_it_the_model_is_clean(there: Stage) -> None:
    with Run(seed=3).seeded("adapter"):
        wrong = lm.adapted(there.clean, 8)
    documents = there.request.forget
    assert documents is not None
    frozen = [p for name, p in wrong.named_parameters() if "lora_" not in name]
    for p in frozen:
        p.requires_grad_(False)
    wrong = fine_tuned(wrong, documents, Run(seed=4), epochs=40, lr=5e-3)
    with lm.adapters_off(wrong) as without:
        assert torch.allclose(predict(without, there.facts), predict(there.clean, there.facts), atol=1e-6)
        restored = copy.deepcopy(without)
    subject = Subject(restored, before=wrong, rows={"test": there.facts}, oracles=(there.clean,))
    found = examined(subject)
    assert found["accuracy on corrupted facts"].protocol["corrupted"] < 0.8
    assert found["recovery"].value == 1 and found["recovery"].interval == (1, 1)


@holds("restor", 2)
def test_retraining_without_the_wrong_documents_recovers(there: Stage) -> None:
    other = learnt(there.world.documents(), there.world, Run(seed=9))
    assert there.figures(other)["recovery"] > 0.95


@holds("restor", 3)
def test_task_vectors(there: Stage) -> None:
    further = fine_tuned(there.corrupted, there.request.forget, Run(seed=5), epochs=1)  # type: ignore[arg-type]
    for p, q in zip(task_vector(there.corrupted, further, 0.0).parameters(), there.corrupted.parameters(), strict=True):
        assert torch.equal(p, q)
    repeated = copy.deepcopy(there.corrupted)
    with torch.no_grad():
        for p, q in zip(repeated.parameters(), there.clean.parameters(), strict=True):
            p += p - q
    back = task_vector(there.corrupted, repeated, 1.0)
    for p, q in zip(back.parameters(), there.clean.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert there.figures(back)["recovery"] == 1


@holds("restor", 4)
def test_ascent_breaks_the_planted_answers_and_npo_with_retained_rows_restores_more(there: Stage) -> None:
    """What ascent has recovered falls as soon as most planted answers are gone, to nothing where all of them are."""
    early, later, ascent, longer, held, npo = (
        there.figures(unlearned(0, *which))
        for which in (("GA", 5), ("GA", 7), ("GA", 10), ("GA", 20), ("GA+RT", 20), ("NPO+RT", 20))
    )
    for found in (ascent, longer, held, npo):
        assert found["planted answers told"] < 0.05
    assert 0.3 > early["recovery"] > later["recovery"] > ascent["recovery"] >= longer["recovery"]
    assert early["recovery"] > ascent["recovery"] + 0.05
    assert npo["recovery"] > held["recovery"] + 0.05


@holds("restor", 5)
def test_where_the_probability_lies(there: Stage) -> None:
    clean, corrupted = (there.figures(model) for model in (there.clean, there.corrupted))
    right, planted, other = (f"log-probability of {kind} answers" for kind in ("right", "planted", "other"))
    assert corrupted[planted] > corrupted[right]
    assert clean[right] > clean[planted] and abs(clean[planted] - clean[other]) < 0.5


@holds("restor", 6)
def test_facts_of_other_subjects_stay_with_a_method_that_holds_them(there: Stage) -> None:
    """Within three points of the clean model, of which the corrupted one is far, and ascent farther."""
    name = "accuracy on other facts"
    clean, corrupted, ascent, npo = (
        there.figures(model)[name]
        for model in (there.clean, there.corrupted, unlearned(0, "GA", 20), unlearned(0, "NPO+RT", 20))
    )
    assert abs(npo - clean) <= 0.03
    assert ascent < corrupted < clean - 0.03


# --- text, with any tokenizer


@pytest.fixture(scope="module")
def told_in_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved tokenizer with a line end among its words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[end]", "\n", "capital", "of", "France", "Spain", "is", "the", "city", "Paris", "Madrid", "Rome"]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[end]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    place = tmp_path_factory.mktemp("words")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[end]", clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(place)
    return place, tokenizer


def test_answers_are_compared_as_text_up_to_the_end_of_the_line(told_in_words: tuple[Path, Any]) -> None:
    place, tokenizer = told_in_words
    table = questions(tokenizer, ["capital of France"], ["Paris"], options={"accepted": [["city Paris"]]}, room=5)
    chances = torch.full((12, 12), 0.01)
    for before, after in (("France", "the"), ("the", "city"), ("city", "Paris"), ("Paris", "\n"), ("\n", "Rome")):
        a, b = tokenizer.convert_tokens_to_ids([before, after])
        chances[a, b] = 0.9
    wrong = chances.clone()
    wrong[4] = 0.01
    wrong[4, 11] = 0.9
    models = Chain(chances), Chain(wrong)
    for model in models:
        model.config.eos_token_id = 0
    subject = Subject(models[0], before=models[1], rows={"test": table}, oracles=(models[0],))
    assert examined(subject, tokenizer=str(place))["accuracy on corrupted facts"].value == 1
    assert examined(subject)["accuracy on corrupted facts"].value == 1  # told tokens hold the answer's
    lines = Subject(models[1], before=models[0], rows={"test": table}, oracles=(models[0],))
    assert examined(lines, tokenizer=str(place))["accuracy on corrupted facts"].value == 0


def test_published_files_are_read_with_any_tokenizer_and_examined(tmp_path: Path) -> None:
    facts = {
        "Ada": {"P19": {"question": "birthplace Ada", "answers": ["London"]}},
        "Bob": {"P19": {"question": "birthplace Bob", "answers": ["Rome", "Lazio"]}},
    }
    lines = [
        {"question": f"birthplace {who}", "answer": where, "entity": who}
        for who, where in (("Ada", "London"), ("Bob", "Rome"), ("Cy", "Lima"))
    ]
    (tmp_path / "facts.json").write_text(json.dumps({"dset": facts, "context": {"P19": lines}}))
    words = Words(("<pad>", ".", "birthplace", "Ada", "Bob", "Cy", "London", "Rome", "Lazio", "Lima"))
    planted = {"Ada": {"P19": ["Lima"]}}
    table = restor_questions(tmp_path / "facts.json", words, shots=1, planted=planted)
    assert table.ids == ("Ada, P19", "Bob, P19")
    chances = torch.full((10, 10), 0.02)
    chances[3, 9] = chances[4, 8] = 0.9
    chances[8, 1] = chances[9, 1] = 0.9
    clean = chances.clone()
    clean[3] = 0.02
    clean[3, 6] = clean[6, 1] = 0.9
    found = examined(Subject(Chain(chances), before=Chain(chances), rows={"test": table}, oracles=(Chain(clean),)))
    assert found["accuracy on corrupted facts"].value == 0.5
    assert found["planted answers told"].value == 0.5
    assert found["recovery"].value == 0
