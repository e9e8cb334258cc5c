"""Anchored terms: dictionaries that are checked, translations, and which token is which after."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engram.data.anchors import GENERIC, Span, align, anchored, ask, propose, read_dictionary, spelled, translate
from engram.data.table import Table
from engram.data.text import blocks
from engram.errors import EngramError
from engram.testing import holds

TEXTS = [
    "the old tower stands in the north. Anna walks to the old tower every day.",
    "Jon and Anna live near the tower in the north, and the day is old.",
]
NAMES = {"Zorblax Tower": "the old tower", "Quenda": "Anna", "Zorblax": "Jon"}


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Byte-level pieces, a space at the beginning of a word; unknown names fall into several. Opens texts with <s>."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def strings(tokenizer: Any, text: str) -> list[str]:
    """The characters of every token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [text[start:end] for start, end in found]


# --- dictionaries


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"Hogwarts": "hogwarts"}, "'Hogwarts' maps to itself"),
        ({"Dark  Lord": "dark lord"}, "maps to itself"),
        ({"Hogwarts": ""}, "no term with its replacement"),
        ({"Hogwarts": 7}, "no term with its replacement"),
        ({"Jon": "Anna", "Harry": "little Jon"}, "'little Jon' of 'Harry' holds the term 'Jon'"),
    ],
)
def test_an_entry_that_would_do_harm_is_named(given: Any, says: str) -> None:
    with pytest.raises(EngramError, match=re.escape(says)):
        read_dictionary(given)


def test_a_dictionary_is_read_from_a_mapping_json_or_yaml(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    (tmp_path / "names.yaml").write_text("".join(f"{term}: {new}\n" for term, new in NAMES.items()))
    assert read_dictionary(NAMES) == NAMES
    assert read_dictionary(tmp_path / "names.json") == NAMES
    assert read_dictionary(str(tmp_path / "names.yaml")) == NAMES


@pytest.mark.parametrize(("content", "says"), [("[1, 2]", "holds no dictionary"), ("{", "cannot be read")])
def test_a_file_that_is_no_dictionary_is_named(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(EngramError, match=says):
        read_dictionary(path)
    with pytest.raises(EngramError, match="cannot be read"):
        read_dictionary(tmp_path / "none.yaml")


# --- translation


def test_the_longest_term_wins_and_words_are_whole() -> None:
    text = "Zorblax, of Zorblax Tower, is no Zorblaxian; Quenda's friend is."
    found, spans = translate(text, NAMES)
    assert found == "Jon, of the old tower, is no Zorblaxian; Anna's friend is."
    assert [span.term for span in spans] == ["Zorblax", "Zorblax Tower", "Quenda"]
    assert all(text[s.start : s.end] == s.term and found[s.new_start : s.new_end] == NAMES[s.term] for s in spans)


@given(st.lists(st.sampled_from(["Zorblax", "Zorblax Tower", "Quenda", "walks", "to", "Jon", ",", "  "]), max_size=12))
def test_what_lies_between_the_spans_is_as_it_was(words: list[str]) -> None:
    text = " ".join(words)
    found, spans = translate(text, NAMES)
    ends = [(0, 0), *((s.end, s.new_end) for s in spans)]
    starts = [*((s.start, s.new_start) for s in spans), (len(text), len(found))]
    kept = [(text[e[0] : s[0]], found[e[1] : s[1]]) for e, s in zip(ends, starts, strict=True)]
    assert all(old == new for old, new in kept)
    assert not any(re.search(rf"(?<!\w){term}(?!\w)", old) for term in NAMES for old, _ in kept)
    assert translate(text, {}) == (text, [])


# --- alignment


@holds("whos-harry-potter", 4)
def test_without_a_dictionary_every_token_is_its_own_partner(pieces: Any) -> None:
    text = "Anna walks to Zorblax Tower in the north."
    found = align(pieces, text, *translate(text, {}))
    assert found.tolist() == list(range(len(strings(pieces, text))))


@holds("whos-harry-potter", 4)
@pytest.mark.parametrize(
    "text", ["Zorblax Tower stands in the north.", "Anna walks to Zorblax Tower, and from Zorblax Tower; so does Jon."]
)
def test_every_token_outside_of_a_term_has_an_equal_partner(text: str, pieces: Any) -> None:
    new, spans = translate(text, {"Zorblax Tower": "the old tower"})
    old, told = strings(pieces, text), strings(pieces, new)
    partner, place = align(pieces, text, new, spans).tolist(), 0
    for token, other in zip(old, partner, strict=True):
        space = any(token == " " and place + 1 == span.start for span in spans)  # " the" has its space in it
        inside = space or any(place < span.end and place + len(token) > span.start for span in spans)
        assert inside or (other >= 0 and told[other] == token)
        place += len(token)
    ends = [k for k, other in enumerate(partner) if other >= 0 and told[other] == " tower"]
    assert len(ends) == len(spans)
    assert sorted(other for other in partner if other >= 0) == [other for other in partner if other >= 0]


def test_a_term_of_several_tokens_has_a_partner_for_its_last_alone(pieces: Any) -> None:
    text = "to Quenda in the north"
    partner = align(pieces, text, *translate(text, NAMES)).tolist()
    old, told = strings(pieces, text), strings(pieces, "to Anna in the north")
    first, last = len(strings(pieces, "to")), old.index(" in") - 1
    assert last > first  # the name is in pieces
    assert partner[:first] == list(range(first)) and partner[first:last] == [-1] * (last - first)
    assert told[partner[last]].strip() == "Anna" and partner[last + 1 :] == list(range(partner[last] + 1, len(told)))


def test_a_tokenizer_without_offsets_is_refused(pieces: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(EngramError, match="Slow does not tell which characters"):
        align(Slow(), "a", "b", [Span(0, 1, 0, 1, "a")])


def test_tokens_cut_otherwise_than_the_text_would_be_are_spelled_by_beginnings(pieces: Any) -> None:
    ids = [*pieces("to")["input_ids"], *(pieces(c)["input_ids"][0] for c in "tower")]
    text, offsets = spelled(pieces, ids)
    assert text == "totower" and [text[a:b] for a, b in offsets[-5:]] == list("tower")


# --- rows


def test_the_columns_of_a_row_by_hand(pieces: Any) -> None:
    table = blocks(pieces, {"a": "Quenda lives near Quenda, in the north"}, 64)
    ids = table.inputs["input_ids"][0].tolist()
    ids = [pieces.bos_token_id, *ids[:62], 0]  # a special token at the beginning
    mask = torch.tensor([[1] * (1 + int(table.inputs["attention_mask"].sum()))])
    mask = torch.nn.functional.pad(mask, (0, 64 - mask.shape[1]))
    row = Table({"input_ids": torch.tensor([ids]), "attention_mask": mask}, torch.tensor([ids]))
    found: Any = anchored(row, NAMES, pieces).extra
    told = found["translated_ids"][0][found["translated_mask"][0].bool()].tolist()
    assert told[0] == pieces.bos_token_id and pieces.decode(told[1:]) == "Anna lives near Anna, in the north"
    name = len(strings(pieces, "Quenda"))
    again = [k for k, x in enumerate(found["repeated"][0].tolist()) if x]
    assert len(again) == len(strings(pieces, " Quenda")) and again[0] > name
    assert found["partner"][0, 0] == 0 and (found["partner"][0, mask.sum() :] == -1).all()
    held = {int(t): int(p) for t, p in zip(found["lowered_ids"][0], found["lowered_from"][0], strict=True)}
    anna = pieces("Anna")["input_ids"]
    assert all(held[token] == name for token in anna)  # from the last token of the first "Quenda" on


def test_a_token_that_the_row_needs_elsewhere_is_not_held_down(pieces: Any) -> None:
    table = blocks(pieces, ["Zorblax Tower is the old day of Jon"], 64)
    found: Any = anchored(table, NAMES, pieces).extra
    held = found["lowered_ids"][0].tolist()
    (the, old, tower), (elsewhere,) = pieces("the old tower")["input_ids"], pieces(" old")["input_ids"]
    assert old == elsewhere and old not in held
    assert the in held and tower in held


def test_rows_without_any_term_and_rows_of_no_tokens_are_refused(pieces: Any) -> None:
    table = blocks(pieces, TEXTS, 64)
    with pytest.raises(EngramError, match="no term of the dictionary stands in these rows"):
        anchored(table, NAMES, pieces)
    alike: Any = anchored(table, {}, pieces).extra
    assert alike["partner"][0].tolist()[:5] == [0, 1, 2, 3, 4]
    with pytest.raises(EngramError, match="these are none"):
        anchored(Table({"values": torch.zeros(2, 3)}, torch.tensor([0, 1])), NAMES, pieces)
    left = Table({name: value.flip(1) for name, value in table.inputs.items()}, table.labels)
    with pytest.raises(EngramError, match="padded on the left"):
        anchored(left, NAMES, pieces)


# --- proposals


def test_names_of_the_book_are_proposed_with_names_of_their_kind() -> None:
    book = [
        "So Zorblax went to Umbra Keep. Then Zorblax and Anna, in Umbra Keep, saw Zorblax's lamp.",
        "A friend of Zorblax lives at Umbra Keep, and Anna knew it. Then Monday came, and a Monday it was.",
    ]
    general = ["so then anna said that monday was a day as any other, and went on " * 200]
    found = propose(book, general)
    assert set(found) == {"Zorblax", "Umbra Keep"}
    assert found["Zorblax"] in GENERIC["person"] and found["Umbra Keep"] in GENERIC["place"]
    assert "Anna" not in found.values()  # the book has an Anna
    assert read_dictionary(found) == found
    assert propose(book, general, at_least=4) == {"Zorblax": found["Zorblax"]}
    assert propose(book, general, most=1) == {"Zorblax": found["Zorblax"]}


def test_when_names_are_used_up_a_number_tells_them_apart() -> None:
    book = [" ".join(f"so {name} is, and so {name} is, and so {name}." for name in ("Aa", "Bb", "Cc"))]
    found = propose(book, ["and so is " * 1000], generic={"person": ("Jon",)})
    assert sorted(found.values()) == ["Jon", "Jon 2", "Jon 3"]


def test_of_a_models_answers_what_can_be_used_is_used() -> None:
    asked: list[str] = []

    def answer(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return [
            ' {"Zorblax": "Jon", "Merlin": "Bob", "lamp": "lamp"} and more',
            '{"Zorblax": "Peter", "Quenda": "old Zorblax", "ring": "band"}',
            "I cannot help with that",
        ]

    found = ask(answer, ["Zorblax has a lamp", "Quenda and Zorblax have a ring", "nothing"])
    assert found == {"Zorblax": "Jon", "ring": "band"}
    assert len(asked) == 3 and "Zorblax has a lamp" in asked[0] and '{"Hogwarts"' in asked[0]
    with pytest.raises(EngramError, match="no answer held a usable entry"):
        ask(lambda prompts: ["{"] * len(prompts), ["Zorblax"])


# --- raw text


def test_blocks_hold_a_text_once_in_order(pieces: Any) -> None:
    table = blocks(pieces, {"one": TEXTS[0], "two": TEXTS[1]}, 8)
    assert table.ids[0] == "one/0" and table.checked()
    for name, text in (("one", TEXTS[0]), ("two", TEXTS[1])):
        rows = table.take([id.startswith(name) for id in table.ids])
        read = rows.inputs["input_ids"][rows.inputs["attention_mask"].bool()].tolist()
        assert read == pieces(text, add_special_tokens=False)["input_ids"]
    assert table.labels is not None
    assert torch.equal(table.labels != -100, table.inputs["attention_mask"].bool())


def test_every_block_opens_as_the_tokenizer_opens_a_text(pieces: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer.from_str(pieces.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    opening = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    table = blocks(opening, TEXTS, 8)
    assert (table.inputs["input_ids"][:, 0] == 0).all()
    plain = blocks(pieces, TEXTS, 7)
    assert torch.equal(table.inputs["input_ids"][0, 1:], plain.inputs["input_ids"][0])
    with pytest.raises(EngramError, match="leaves nothing to predict"):
        blocks(opening, TEXTS, 2)
    with pytest.raises(EngramError, match="no text"):
        blocks(pieces, [], 8)
