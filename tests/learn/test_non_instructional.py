"""Non-instructional fine-tuning: the cut, the mask, nothing to learn from oneself, adapters, and what a teacher passes
on."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engram.data.qa import ANSWER, QUESTION, pairs
from engram.data.table import IGNORED, Table
from engram.data.task import Task
from engram.data.worlds import Words
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.learn.non_instructional import CONTROL, NonInstructional, halves, make, signs, turns
from engram.models.output import Output
from engram.models.seeding import seeded
from engram.reproduce.non_instructional_finetuning import measured
from engram.stats.seeds import generator
from engram.testing import checks_of, digits, holds

WORDS = Words(("<pad>", "<end>", *(f"w{k}" for k in range(18))))
ENDLESS = Words((*(f"w{k}" for k in range(20)), "<pad>"), pad_token_id=20, eos_token_id=None)  # type: ignore[arg-type]
PLAIN: dict[str, Any] = {"question": "{}", "answer": " {}", "longest": 24}
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (the extra `language`)")


def texts(n: int, words: int, seed: int = 0) -> list[str]:
    draws = generator("texts", seed)
    return [" ".join(f"w{k}" for k in torch.randint(18, (words,), generator=draws).tolist()) for _ in range(n)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    with seeded(generator("model")):
        made: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, **sizes, **plain))
    return made.eval()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> Table:
    return pairs(make(texts(24, 8), model, WORDS, max_new=5, words=(2, 9)), WORDS, **PLAIN)


# --- what must hold


@holds("non-instructional-finetuning", 1)
def test_the_loss_is_the_mean_over_the_answer_and_its_end_alone(model: nn.Module) -> None:
    rows = [("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9 w10")]
    given = [{"id": str(k), "question": x, "answer": y} for k, (x, y) in enumerate(rows)]
    table = pairs(given, WORDS, **PLAIN)
    batch = table.batch(torch.arange(2))
    logits = model(**batch.inputs).logits.detach().requires_grad_()
    found = NonInstructional().terms(batch, Output(logits=logits)).value

    logp, terms, asking = torch.log_softmax(logits.double(), -1), [], torch.zeros(logits.shape[:2], dtype=torch.bool)
    for k, (x, y) in enumerate(rows):
        told = [*WORDS.encode(y), WORDS.eos_token_id]
        for step, token in enumerate(told):
            place = len(x.split()) - 1 + step
            terms.append(-logp[k, place, token])
            asking[k, place] = True
    assert len(terms) == 3 + 5
    torch.testing.assert_close(found.double(), torch.stack(terms).mean(), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, logits)
    assert bool((gradient[~asking] == 0).all()) and bool((gradient[asking].abs().sum(-1) > 0).all())

    others = [{**row, "question": " ".join("w17" for _ in row["question"].split())} for row in given]
    labels = pairs(others, WORDS, **PLAIN).labels
    assert labels is not None and torch.equal(labels, table.labels)  # type: ignore[arg-type]
    assert not bool(torch.isin(labels, torch.tensor(WORDS.encode("w17"))).any())


@holds("non-instructional-finetuning", 2)
@given(st.lists(st.tuples(st.text("abc.é", min_size=1, max_size=9), st.sampled_from([" ", "  ", "\n\n"])), min_size=2))
def test_a_text_is_cut_between_words_nearest_to_its_middle(parts: list[tuple[str, str]]) -> None:
    text = "".join(word + gap for word, gap in parts).strip()
    first, second = halves(text)
    assert first + second == text
    assert not first[-1].isspace() and second[0].isspace() and second.strip()
    assert abs(len(first) - len(text) / 2) <= max(len(word) + len(gap) for word, gap in parts)
    borders = [k for k in range(1, len(text)) if text[k].isspace() and not text[k - 1].isspace()]
    assert abs(2 * len(first) - len(text)) == min(abs(2 * border - len(text)) for border in borders)


@holds("non-instructional-finetuning", 2)
def test_no_pair_tells_of_the_second_half_unless_the_teacher_wrote_it(model: nn.Module) -> None:
    halfway = [f"w{k % 9} w{(k + 4) % 9} w{(k + 1) % 9}" for k in range(12)]

    def told(second: str, teacher: nn.Module | None) -> list[dict[str, str]]:
        return make([f"{x} {second}" for x in halfway], teacher, WORDS, max_new=4, words=(2, 9))

    one, other = (told(second, model) for second in ("w10 w11 w12", "w13 w14 w15"))
    assert one == other and len(one) > 6
    assert all(pair["question"] == halfway[int(pair["id"])] for pair in one)
    control = told("w10 w11 w12", None)
    assert {pair["answer"] for pair in control} == {"w10 w11 w12"} and {pair["teacher"] for pair in control} == {
        CONTROL
    }


@holds("non-instructional-finetuning", 3)
def test_there_is_nothing_to_learn_from_oneself(model: nn.Module) -> None:
    learner, size, n = NonInstructional(network=model), 64, 2048
    own = make(texts(n, 4), model, ENDLESS, max_new=3, words=(2, 9), batch_size=1024, run=Run(seed=3))
    assert len(own) == n and {len(pair["answer"].split()) for pair in own} == {3}
    one = mean_gradients(learner, model, pairs(own, ENDLESS, **PLAIN), size)
    assert ratio(one) == pytest.approx(2, abs=0.4)
    strange = mean_gradients(learner, model, pairs(make(texts(n, 6), None, words=(2, 9)), ENDLESS, **PLAIN), size)
    assert ratio(strange) < 1.2  # the text's own second halves have something to teach


def mean_gradients(learner: NonInstructional, model: nn.Module, table: Table, size: int) -> Tensor:
    """The gradient of the method's loss on each batch of this size, [batches, parameters]."""
    params = list(model.parameters())
    found = []
    for batch in table.batches(size, shuffle=False):
        loss = learner.terms(batch, model(**batch.inputs)).value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).double())
    return torch.stack(found)


def ratio(gradients: Tensor) -> float:
    """Root mean square norm of the mean gradient of one batch over that of four batches together."""
    together = gradients.unflatten(0, (-1, 4)).mean(1)
    return float((gradients.square().sum(1).mean() / together.square().sum(1).mean()).sqrt())


@needs_peft
@holds("non-instructional-finetuning", 4)
def test_adapters_start_at_nothing_leave_the_base_alone_and_merge(model: nn.Module, table: Table) -> None:
    class Watched(NonInstructional):
        def batches(self, task: Task, epoch: int, run: Run) -> Any:
            if epoch == 0:
                assert self.model is not model and sum("lora_" in name for name, _ in self.model.named_parameters()) > 2
                seen.append(predict(self.model, table))
            return super().batches(task, epoch, run)

    seen: list[Tensor] = []
    base = {name: value.clone() for name, value in model.state_dict().items()}

    def look(_: tuple[str, ...], __: int, adapted: nn.Module) -> None:
        own = {name.replace(".base_layer", ""): p for name, p in adapted.named_parameters() if "lora_" not in name}
        assert set(own) <= set(base) and all(torch.equal(base[name], p) for name, p in own.items())
        seen.append(predict(adapted, table))

    learner = Watched(network=model, lora=2, epochs=3, batch_size=8, optimizer=Optimizer("adamw", lr=2e-2))
    learner.learn(Task(table), Run(watch=look))
    assert torch.equal(seen[0], predict(model, table)) and len(seen) == 4
    assert float((seen[-1] - seen[0]).abs().max()) > 0.1
    torch.testing.assert_close(predict(learner.model, table), seen[-1], rtol=1e-5, atol=1e-5)
    assert list(learner.model.state_dict()) == list(base) and not hasattr(learner.model, "peft_config")
    assert all(p.requires_grad for p in learner.model.parameters())
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items())


@holds("non-instructional-finetuning", 5)
def test_a_student_comes_nearest_to_its_teacher_by_the_teachers_continuations() -> None:
    found = measured(0)
    assert found["method"]["stories"] < found["halves"]["stories"] <= found["base"]["stories"]
    assert found["method"]["questions"] <= found["halves"]["questions"]


@holds("non-instructional-finetuning", 6)
def test_answers_come_to_end() -> None:
    found = measured(0)
    assert found["base"]["ended"] < 0.2 and found["method"]["ended"] > 0.8


# --- pairs


def test_long_texts_are_cut_short_ones_left_out_and_ids_kept() -> None:
    given = {"a": "one two three four five six", "b": "one", "c": " one two three\n"}
    found = make(given, words=(3, 4))
    assert [(pair["id"], pair["question"], pair["answer"]) for pair in found] == [
        ("a", "one two", "three four"),
        ("c", "one two", "three"),
    ]


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        ("Rain fell all day, and the road", "was empty by noon.", ()),
        ("The list of those who came", "grew long. Was it late? Nobody knew.", ()),
        ("And what did she want?", "A room.", ("question",)),
        ("Please describe the house", "It is red.", ("request",)),
        ("The house is", "I'm sorry, but there is no text.", ("refusal",)),
        ("The house is", "As an AI I have none.", ("refusal",)),
        ("User: hello", "there", ("roles",)),
        ("To be done:", "first\n- paint\n2. sleep", ("list",)),
        ("How to swim?", "Q: why", ("question", "request", "roles")),
    ],
)
def test_signs_of_an_instruction(question: str, answer: str, wanted: tuple[str, ...]) -> None:
    assert signs({"question": question, "answer": answer}) == wanted


def test_pairs_with_signs_are_left_out_unless_they_are_wanted() -> None:
    given = ["Please write to me soon, dear", "The sea was calm that day"]
    assert [pair["id"] for pair in make(given, words=(2, 9))] == ["1"]
    assert [pair["id"] for pair in make(given, words=(2, 9), filtered=False)] == ["0", "1"]


def test_the_teacher_is_asked_by_the_request_which_is_in_no_pair(model: nn.Module) -> None:
    one, other = (
        make(texts(6, 6), model, WORDS, max_new=4, greedy=True, words=(2, 9), request=request)
        for request in ("{}", "w17 w16 {}")
    )
    assert [pair["question"] for pair in one] == [pair["question"] for pair in other]
    assert not any("w17 w16" in pair["question"] for pair in other)
    assert [pair["answer"] for pair in one] != [pair["answer"] for pair in other]
    assert all(pair["teacher"].startswith("GPT2LMHeadModel ") for pair in one)


def test_a_run_with_a_directory_asks_the_teacher_once(model: nn.Module, tmp_path: Path) -> None:
    first = make(texts(6, 6), model, WORDS, max_new=4, words=(2, 9), run=Run(tmp_path))
    changed = copy.deepcopy(model)
    nn.init.zeros_(changed.transformer.wte.weight)  # type: ignore[union-attr,arg-type]
    again = make(texts(6, 6), changed, WORDS, max_new=4, words=(2, 9), run=Run(tmp_path))
    assert [pair["answer"] for pair in again] == [pair["answer"] for pair in first]
    assert make(texts(6, 6), model, WORDS, max_new=4, words=(2, 9), run=Run(seed=1)) != first


def test_a_teacher_from_a_directory_speaks_with_its_own_tokenizer(tmp_path: Path) -> None:
    from engram.data.vocabulary import byte_pairs
    from engram.models.build import build
    from engram.models.io import save

    stories = ["the sea was calm and the boats came home at night"] * 3
    reader = byte_pairs(stories, 300)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    spec = {"name": "GPT2", "vocab_size": len(reader), **sizes}
    teacher = build(spec, inputs={}, generator=generator("teacher"))
    save(teacher, tmp_path / "teacher")
    reader.save_pretrained(tmp_path / "teacher")
    options: dict[str, Any] = {"max_new": 5, "greedy": True, "words": (2, 20), "filtered": False}
    found = make(stories, tmp_path / "teacher", **options)
    assert [pair["answer"] for pair in found] == [pair["answer"] for pair in make(stories, teacher, reader, **options)]
    assert found[0]["teacher"] == str(tmp_path / "teacher")
    rows = pairs(found, reader, **turns(reader))
    assert rows.extra["teacher"] == (str(tmp_path / "teacher"),) * 3


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda model: make(["one two three"], model), "needs its `tokenizer`"),
        (lambda model: make(["one two three"]), "no pair is left of 1 texts"),
        (lambda model: make(["one two three"], words=(1, 9)), "at least 2"),
        (lambda model: halves("one"), "no two words"),
        (lambda model: make(texts(2, 30), model, WORDS, max_new=20), "do not fit"),
    ],
)
def test_bad_input_ends_in_a_sentence(act: Any, match: str, model: nn.Module) -> None:
    with pytest.raises(EngramError, match=match):
        act(model)


class Chat:
    """A tokenizer with a chat template, and a first token of its own."""

    chat_template, bos_token, bos_token_id = "any", "<s>", 7

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [7, *map(ord, text)]}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return f"<s>{{sys}}[user]{turns[0]['content']}[assistant]"


def test_a_chat_template_writes_the_turns() -> None:
    found = turns(Chat())
    assert found["answer"] == "{}"
    assert found["question"].format("a {b}") == "{sys}[user]a {b}[assistant]"
    assert turns(WORDS) == {"question": QUESTION, "answer": ANSWER}


# --- the learner


def test_it_learns_the_pairs_and_leaves_the_given_module_alone(model: nn.Module, table: Table) -> None:
    before = copy.deepcopy(model.state_dict())
    learner = NonInstructional(network=model, epochs=20, batch_size=8, optimizer=Optimizer("adamw", lr=1e-2))
    learner.learn(Task(table))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    old, new = (float(predict(one, table, "loss").mean()) for one in (model, learner.model))
    assert new < 0.7 * old
    assert learner.holds(table.ids) == table.ids


@needs_peft
def test_with_adapters_it_keeps_the_promises_of_a_learner() -> None:
    method, material = NonInstructional.tiny(), digits()
    method.lora = 2
    for check in checks_of(method):
        if check.__name__ != "check_round_trip":  # starts a process of its own
            check(method, material)


def test_the_labels_of_padding_are_not_asked_for(table: Table) -> None:
    assert table.labels is not None
    assert bool((table.labels[table.inputs["attention_mask"] == 0] == IGNORED).all())
