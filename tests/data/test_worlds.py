"""Generated worlds: what they say is true of them, in tokens and in words, with their own tokenizer and with others."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.data.table import IGNORED, MISSING, Table, Target
from engram.data.worlds import (
    ConceptWorld,
    FactWorld,
    Words,
    eliminated,
    invented,
    questions,
    restor_documents,
    restor_questions,
)
from engram.errors import EngramError
from engram.stats.seeds import generator

FACTS = FactWorld(subjects=6, relations=2, objects=5)
CONCEPTS = ConceptWorld()


def text(world: FactWorld | ConceptWorld, tokens: Any) -> str:
    return world.tokenizer.decode(tokens)


# --- words


def test_words_and_back() -> None:
    words = Words(("<pad>", ".", "one", "two"))
    assert words("two one .")["input_ids"] == words.encode("two one .") == [3, 2, 1]
    assert words.decode([3, 2, 1, 0]) == "two one . <pad>"
    assert words.decode(torch.tensor([3, 2, 1, 0]), skip_special_tokens=True) == "two one"
    assert len(words) == 4 and words.number["two"] == 3
    with pytest.raises(EngramError, match=r"unknown word of this world 'twoo'; did you mean 'two'"):
        words.encode("one twoo")


def test_invented_words_are_many_different_and_reproducible() -> None:
    words = invented(3000)
    assert len(set(words)) == 3000 and words == invented(3000) and words[:50] == invented(50)
    assert words[:50] != invented(50, seed=1)
    assert not set(words[:5]) & set(invented(50, taken=words[:5]))


# --- questions


def test_questions_by_hand() -> None:
    words = Words(("<pad>", ".", "who", "where", "here", "over", "there"))
    options = {"accepted": [["here"], ["over there", "there"]], "corrupted": [[], ["here"]]}
    table = questions(words, ["who", "who where"], ["here", "over there"], options=options, room=4)
    assert table.inputs["input_ids"].tolist() == [[2, 4, 1, 0, 0, 0], [2, 3, 5, 6, 1, 0]]
    assert table.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert table.labels is not None and table.target == Target.TOKENS
    assert table.labels.tolist() == [[IGNORED, 4, 1] + [IGNORED] * 3, [IGNORED, IGNORED, 5, 6, 1, IGNORED]]
    assert table.extra["accepted_ids"].tolist() == [[[2, 4, 0, 0], [0] * 4], [[2, 3, 5, 6], [2, 3, 6, 0]]]  # type: ignore[union-attr]
    assert table.extra["accepted_labels"].tolist() == [  # type: ignore[union-attr]
        [[IGNORED, 4, IGNORED, IGNORED], [IGNORED] * 4],
        [[IGNORED, IGNORED, 5, 6], [IGNORED, IGNORED, 6, IGNORED]],
    ]
    assert table.extra["corrupted_labels"].tolist() == [[[IGNORED] * 3], [[IGNORED, IGNORED, 4]]]  # type: ignore[union-attr]
    with pytest.raises(EngramError, match="the prompt 'who' or its answer '' has no token"):
        questions(words, ["who"], [""])


def test_a_subword_tokenizer_reads_prompt_and_answer_together() -> None:
    """A byte-level tokenizer keeps the space with the word behind it; one that ends texts by itself gets no second
    end."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(["the capital of France is Paris"] * 5, vocab_size=300, special_tokens=["<end>"])
    plain = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<end>")
    table = questions(plain, ["the capital of France is"], ["Paris"])
    asked = table.labels[0] != IGNORED  # type: ignore[index]
    assert plain.decode(table.inputs["input_ids"][0][asked]) == " Paris<end>"
    assert plain.decode(table.inputs["input_ids"][0]) == "the capital of France is Paris<end>"
    inner._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    ending = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<end>")
    assert ending("Paris")["input_ids"][-1] == 0
    again = questions(ending, ["the capital of France is"], ["Paris"])
    assert again.inputs["input_ids"].tolist() == table.inputs["input_ids"].tolist()


# --- facts


def test_a_world_is_a_function_of_its_settings() -> None:
    same, other = FactWorld(6, 2, 5), FactWorld(6, 2, 5, seed=1)
    assert torch.equal(same.truth, FACTS.truth) and same.tokenizer == FACTS.tokenizer
    assert not torch.equal(other.truth, FACTS.truth)
    assert same.questions().digest == FACTS.questions().digest
    assert len(set(FACTS.tokenizer.vocabulary)) == 2 + 6 + 2 + 2 * 5


def test_documents_say_what_is_told() -> None:
    planted = FACTS.planted([0, 1])
    table = FACTS.documents(FACTS.told(planted), planted != MISSING)
    for row, (subject, relation) in enumerate(product((0, 1), (0, 1))):
        wanted = FACTS.statement(subject, relation, int(planted[subject, relation]))
        assert text(FACTS, table.inputs["input_ids"][row]) == wanted
        assert table.ids[row] == FACTS.question(subject, relation)
    assert table.labels is not None and len(table) == 4
    assert bool((table.labels[:, 0] == IGNORED).all())
    assert torch.equal(table.labels[:, 1:], table.inputs["input_ids"][:, 1:])


def test_what_is_planted_is_wrong_and_planted_only_there() -> None:
    planted = FactWorld().planted(range(25))
    assert bool((planted[25:] == MISSING).all())
    assert bool((planted[:25] != FactWorld().truth[:25]).all()) and bool((planted[:25] >= 0).all())
    told = FactWorld().told(planted)
    assert torch.equal(told[25:], FactWorld().truth[25:]) and torch.equal(told[:25], planted[:25])


def test_unrelated_statements_are_true_and_of_others() -> None:
    planted = FACTS.planted([0])
    table = FACTS.documents(FACTS.told(planted), planted != MISSING, unrelated=3)
    true = {FACTS.statement(s, r, int(FACTS.truth[s, r])) for s in range(6) for r in range(2)}
    places = set()
    for row, relation in zip(table.inputs["input_ids"], (0, 1), strict=True):
        words = text(FACTS, row).split()
        said = [" ".join(words[k : k + 4]) for k in range(0, len(words), 4)]
        wrong = FACTS.statement(0, relation, int(planted[0, relation]))
        assert said.count(wrong) == 1 and len(said) == 4
        places.add(said.index(wrong))
        others = [one for one in said if one != wrong]
        assert set(others) <= true
        assert not any(one.startswith(FACTS.question(0, 0).split()[0]) for one in others)
    assert places <= {0, 1, 2, 3}


def test_questions_have_their_options() -> None:
    planted = FACTS.planted([0, 1])
    table = FACTS.questions(planted=planted, options=3)
    ids, labels = table.inputs["input_ids"], table.labels
    assert labels is not None and len(table) == 12
    for row, (subject, relation) in enumerate(product(range(6), range(2))):
        true, wrong = int(FACTS.truth[subject, relation]), int(planted[subject, relation])
        assert text(FACTS, ids[row]) == FACTS.statement(subject, relation, true)
        assert labels[row].tolist()[:2] == [IGNORED, IGNORED]
        kinds = {kind: _told(table, kind, row) for kind in ("accepted", "corrupted", "perturbed")}
        assert kinds["accepted"] == [FACTS.object(relation, true)]
        assert kinds["corrupted"] == ([] if wrong == MISSING else [FACTS.object(relation, wrong)])
        assert len(set(kinds["perturbed"])) == 3
        assert set(kinds["perturbed"]) <= {FACTS.object(relation, k) for k in range(5) if k not in (true, wrong)}
    assert "corrupted_ids" not in FACTS.questions().extra
    asked = FACTS.questions(planted != MISSING, planted, values=FACTS.told(planted))
    assert text(FACTS, asked.inputs["input_ids"][0]) == FACTS.statement(0, 0, int(planted[0, 0]))


def _told(table: Table, kind: str, row: int) -> list[str]:
    labels = torch.as_tensor(table.extra[f"{kind}_labels"])[row]
    return [text(FACTS, one[one != IGNORED]) for one in labels if bool((one != IGNORED).any())]


def test_siblings_share_the_object() -> None:
    world = FactWorld(subjects=30, relations=1, objects=3)
    found = world.siblings(4, 0)
    assert found and 4 not in found
    assert found == [k for k in range(30) if k != 4 and world.truth[k, 0] == world.truth[4, 0]]


# --- concepts


def test_concepts_are_different_conjunctions() -> None:
    definitions = CONCEPTS.definitions
    assert definitions.sum(1).tolist() == [3] * 8
    assert len({tuple(row) for row in definitions.tolist()}) == 8
    with pytest.raises(EngramError, match="4 attributes make 4 concepts of 3, not 8"):
        _ = ConceptWorld(attributes=4).definitions


@given(st.integers(0, 10**6))
def test_an_item_is_what_the_answer_says_and_lacks_one_attribute_at_most(seed: int) -> None:
    draws = generator("items", seed)
    concepts = CONCEPTS.random_concepts(50, draws)
    items, answers = CONCEPTS.items(concepts, draws)
    assert torch.equal((items | ~concepts).all(1), answers)
    assert torch.equal((~items & concepts).sum(1), (~answers).long())


def test_nothing_but_the_concept_tells_the_answer() -> None:
    """The number of attributes and each single one are distributed alike in both, over random concepts: within four
    standard errors of 40,000 items."""
    draws = generator("balance")
    items, answers = CONCEPTS.items(CONCEPTS.random_concepts(40_000, draws), draws)
    assert abs(float(answers.double().mean()) - 0.5) < 4 * 0.5 / 200
    for share in ((items.sum(1)[:, None] == torch.arange(7)).double(), items.double()):
        gap = share[answers].mean(0) - share[~answers].mean(0)
        assert float(gap.abs().max()) < 4 * 0.01


def test_what_is_said_in_words() -> None:
    concept = CONCEPTS.definitions[:1]
    a, b, c = (CONCEPTS.tokenizer.vocabulary[int(CONCEPTS.attribute(k))] for k in concept[0].nonzero()[:, 0])
    name, other = CONCEPTS.name(torch.tensor([0])), CONCEPTS.name(torch.tensor([CONCEPTS.concepts]))
    own, part = (CONCEPTS.tokenizer.vocabulary[int(one)] for one in (name, other))
    assert text(CONCEPTS, CONCEPTS.define(name, concept)[0]) == f"{own} means {a} {b} {c} ."
    assert text(CONCEPTS, CONCEPTS.chain(name, other, concept)[0]) == f"{part} means {a} {b} . {own} means {part} {c} ."
    said = text(CONCEPTS, CONCEPTS.query(name, concept)[0]).split()
    assert said[0] == own and said[-1] == "?" and {a, b, c} < set(said)
    assert sum(word.startswith("not-") for word in said) == 3
    hidden = text(CONCEPTS, CONCEPTS.query(name, concept, concept[0])[0]).split()
    assert not {a, b, c} & set(hidden) and len(hidden) == len(said)
    table = CONCEPTS.table(name, concept, torch.tensor([True]), CONCEPTS.define(name, concept))
    assert text(CONCEPTS, table.inputs["input_ids"][0]).endswith("? yes")
    assert table.labels is not None and (table.labels[0] != IGNORED).tolist() == [False] * 14 + [True]
    assert text(CONCEPTS, torch.as_tensor(table.extra["perturbed_ids"])[0, 0]).endswith("? no")
    nothing = text(CONCEPTS, CONCEPTS.irrelevant(1, 50, generator("nothing"))[0]).split()
    assert not set(nothing) & set(text(CONCEPTS, table.inputs["input_ids"][0]).split())


@given(st.integers(0, 10**6))
def test_a_teaching_sequence_leaves_one_conjunction(seed: int) -> None:
    """Of all conjunctions of any size, only the concept agrees with all of its examples; with one example less, another
    one does too."""
    concept = CONCEPTS.random_concepts(1, generator("teach", seed))
    items, answers = CONCEPTS.teaching(concept)
    assert answers[0].tolist() == [True, False, False, False]
    every = torch.tensor(list(product([False, True], repeat=6)))
    told = (items[0][None] | ~every[:, None]).all(2)  # [conjunctions, examples]
    assert every[(told == answers).all(1)].tolist() == concept.tolist()
    for left_out in range(4):
        rest = [k for k in range(4) if k != left_out]
        assert int((told[:, rest] == answers[:, rest]).all(1).sum()) > 1


@given(st.integers(0, 10**6))
def test_elimination_agrees_with_the_conjunctions_that_are_left(seed: int) -> None:
    """The exact learner says yes where all monotone conjunctions that agree with the positive examples say yes."""
    draws = generator("eliminate", seed)
    concept = CONCEPTS.random_concepts(1, draws)
    items, answers = CONCEPTS.items(concept.expand(5, -1), draws)
    asked, _ = CONCEPTS.items(concept, draws)
    every = torch.tensor(list(product([False, True], repeat=6)))
    left = every[(items[answers][None] | ~every[:, None]).all(2).all(1)]
    assert bool(eliminated(items[None], answers[None], asked)) == bool((asked | ~left).all())


def test_siblings_share_an_attribute() -> None:
    world = ConceptWorld(attributes=9, concepts=20)
    found = world.siblings(0)
    shared = [(world.definitions[k] & world.definitions[0]).sum().item() for k in found]
    assert shared == sorted(shared, reverse=True) and min(shared) > 0 and 0 not in found
    rest = set(range(1, 20)) - set(found)
    assert all(not bool((world.definitions[k] & world.definitions[0]).any()) for k in rest)


# --- published files


@pytest.fixture
def published(tmp_path: Path) -> Path:
    facts = {
        "Ada": {
            "P19": {"question": "birthplace Ada", "answers": ["London"]},
            "P26": {"question": "spouse Ada", "answers": ["Bob"]},
        },
        "Bob": {"P19": {"question": "birthplace Bob", "answers": ["Rome", "Lazio"]}},
        "Cy": {"P19": {"question": "birthplace Cy", "answers": ["Lima"]}},
    }
    pairs = (("Ada", "London"), ("Bob", "Rome"), ("Cy", "Lima"))
    lines = [{"question": f"birthplace {who}", "answer": where, "entity": who} for who, where in pairs]
    place = tmp_path / "facts.json"
    place.write_text(json.dumps({"dset": facts, "context": {"P19": lines}}))
    return place


class Lines:
    """A tokenizer of words and line ends, each as it comes."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.words = ["<end>"]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        found = text.replace("\n", " \n ").split(" ")
        for word in found:
            if word and word not in self.words:
                self.words.append(word)
        return {"input_ids": [self.words.index(word) for word in found if word]}

    def decode(self, ids: Any) -> str:
        return " ".join(self.words[k] for k in ids.tolist())


def test_published_facts_become_questions_that_do_not_show_their_answer(published: Path) -> None:
    tokenizer = Lines()
    table = restor_questions(published, tokenizer, shots=2, planted={"Ada": {"P19": ["Lima"]}})
    assert table.ids == ("Ada, P19", "Ada, P26", "Bob, P19", "Cy, P19")
    prompts = [
        tokenizer.decode(ids[: int((labels != IGNORED).int().argmax())])
        for ids, labels in zip(table.inputs["input_ids"], table.labels, strict=True)  # type: ignore[arg-type]
    ]
    assert prompts[0] == "birthplace Bob Rome \n birthplace Cy Lima \n birthplace Ada"
    assert prompts[1] == "spouse Ada"
    assert prompts[2] == "birthplace Ada London \n birthplace Cy Lima \n birthplace Bob"
    words = {kind: _options(table, kind, tokenizer) for kind in ("accepted", "perturbed", "corrupted")}
    assert words["accepted"] == [["London"], ["Bob"], ["Rome", "Lazio"], ["Lima"]]
    assert [set(some) for some in words["perturbed"]][1:3] == [set(), {"London", "Lima"}]
    assert words["corrupted"] == [["Lima"], [], [], []]
    assert restor_questions(published, tokenizer, entities=["Cy"]).ids == ("Cy, P19",)
    begin = (table.labels != IGNORED).int().argmax(1)  # type: ignore[operator,union-attr]
    assert int(begin.max()) + 16 == table.inputs["input_ids"].shape[1]


def _options(table: Table, kind: str, tokenizer: Lines) -> list[list[str]]:
    labels = torch.as_tensor(table.extra[f"{kind}_labels"])
    return [[tokenizer.decode(o[o != IGNORED]) for o in row if bool((o != IGNORED).any())] for row in labels]


def test_published_documents_have_names(tmp_path: Path) -> None:
    place = tmp_path / "mix_a0.json"
    place.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert restor_documents(place) == {"mix_a0/0": "one", "mix_a0/1": "two"}


def test_other_files_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="is no corruption file of RESTOR"):
        restor_documents(published)
    place = tmp_path / "list.json"
    place.write_text('[{"text": 3}]')
    with pytest.raises(EngramError, match="is no corruption file of RESTOR"):
        restor_documents(place)
    with pytest.raises(EngramError, match=r"is no facts\.json of RESTOR"):
        restor_questions(place, Lines())
    with pytest.raises(EngramError, match=r"nowhere\.json cannot be read"):
        restor_documents(tmp_path / "nowhere.json")
    with pytest.raises(EngramError, match="unknown entity 'Adda'; did you mean 'Ada'"):
        restor_questions(published, Lines(), entities=["Adda"])
