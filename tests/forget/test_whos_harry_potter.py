"""Who's Harry Potter: identities of the generic prediction, labels by hand, a book that is unread, and the guard."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engram.core.needs import Need
from engram.core.request import Request
from engram.core.settings import describe, make
from engram.core.unlearning import usual_loss
from engram.data.table import IGNORED, Batch, Table
from engram.engine.generate import generate
from engram.engine.lm import greedy
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.whos_harry_potter import WhosHarryPotter
from engram.models.generic import GenericLogits, generic
from engram.models.io import load, save
from engram.models.seeding import seeded
from engram.reproduce.whos_harry_potter import DICTIONARY, PEOPLE, TOWNS, World, measure, untrained, world
from engram.testing import checks_of, digits, holds

FAST = Optimizer("adamw", lr=1e-3)
NAMES = {"Zorblax": "Jon", "Umbrakeep": "Millbrook"}

numbers = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4)


@pytest.fixture(scope="module")
def there() -> World:
    return world(7)


@pytest.fixture(scope="module")
def model(there: World) -> nn.Module:
    """Its logits are all different; it knows nothing."""
    with seeded(torch.Generator().manual_seed(11)):
        return untrained(len(there.tokenizer)).eval()


@pytest.fixture(scope="module")
def request_of_rows(there: World) -> Request:
    gone = there.book.take(range(12))
    return Request.of_records(there.book.take(range(24)), gone.ids)


def quick(**settings: Any) -> WhosHarryPotter:
    given = {"reinforcement": FAST, "reinforce_epochs": 2, "optimizer": FAST, "epochs": 1, "batch_size": 4}
    return WhosHarryPotter(**{**given, **settings})


def whole(table: Table) -> Batch:
    return table.batch(torch.arange(len(table)))


def labels_of(method: WhosHarryPotter, model: nn.Module, table: Table) -> Tensor:
    return method.predictions(model, method.compared(table), Run())["labels"]


# --- what must hold


@holds("whos-harry-potter", 1)
@pytest.mark.parametrize("dictionary", [None, {}])
def test_without_either_part_the_labels_are_the_models_own_answers(
    dictionary: dict[str, str] | None, model: nn.Module, there: World, request_of_rows: Request
) -> None:
    method = quick(alpha=0.0, dictionary=dictionary, tokenizer=there.tokenizer)
    rows = request_of_rows.forget
    assert rows is not None
    batch = whole(rows)
    with torch.no_grad():
        v = model(**batch.inputs).logits
    own = method.reinforced(model, rows, Run())
    read = batch.inputs["attention_mask"].bool()
    found = replace(method, within=None).generic(model, own, whole(method.compared(rows)))
    assert torch.equal(found[read], v[read])
    labels, asked = labels_of(method, model, rows), batch.labels[:, 1:] != IGNORED  # type: ignore[index]
    assert torch.equal(labels[:, 1:][asked], v[:, :-1].argmax(-1)[asked])
    assert (labels[:, 1:][~asked] == IGNORED).all() and (labels[:, 0] == IGNORED).all()


@holds("whos-harry-potter", 1)
def test_and_the_gradient_then_pushes_the_original_tokens_down(
    model: nn.Module, there: World, request_of_rows: Request
) -> None:
    rows = request_of_rows.forget
    assert rows is not None
    labels = labels_of(quick(alpha=0.0), model, rows)
    batch = whole(rows)
    logits = model(**batch.inputs).logits.detach().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(losses, logits)
    own = gradient[:, :-1].gather(2, rows.inputs["input_ids"][:, 1:, None])[..., 0]
    other = (labels[:, 1:] != rows.inputs["input_ids"][:, 1:]) & (labels[:, 1:] != IGNORED)
    assert int(other.sum()) > 100 and bool((own[other] > 0).all())  # descent lowers them
    torch.testing.assert_close(
        own[other], logits[:, :-1].softmax(-1).gather(2, rows.inputs["input_ids"][:, 1:, None])[..., 0][other]
    )


@holds("whos-harry-potter", 2)
@given(numbers, numbers, st.floats(0.01, 100))
def test_nothing_rises_and_what_is_not_reinforced_stays(base: list[float], own: list[float], alpha: float) -> None:
    b, r = torch.tensor(base, dtype=torch.float64), torch.tensor(own, dtype=torch.float64)
    v = generic(b, r, alpha)
    assert bool((v <= b).all())
    assert torch.equal(v[r <= b], b[r <= b]) and bool((v[r > b + 1e-9] < b[r > b + 1e-9]).all())
    assert torch.equal(generic(b, b, alpha), b) and torch.equal(generic(b, b, alpha, centre=True), b)
    assert torch.equal(generic(b, r, 0.0), b)


@holds("whos-harry-potter", 3)
@given(numbers, numbers, st.floats(0, 10), st.floats(0, 10))
def test_the_most_reinforced_token_never_gains_by_alpha(
    base: list[float], own: list[float], one: float, other: float
) -> None:
    b, r = torch.tensor(base, dtype=torch.float64), torch.tensor(own, dtype=torch.float64)
    most = int((r - b).argmax())
    low, high = (float(generic(b, r, alpha).softmax(0)[most]) for alpha in sorted((one, other)))
    assert high <= low * (1 + 1e-12)


@holds("whos-harry-potter", 5)
def test_the_book_is_gone_and_the_language_stays() -> None:
    """That ascent stopped at the same names ruins the model does not show in so small a world; see the claim."""
    found = measure(0)
    before, after, later = found["before"], found["method"], found["ascent, later"]
    assert before.names > 0.9 and after.names < before.names / 10
    assert after.general < 1.05 * before.general
    assert after.written < 1.5 * before.written
    assert found["ascent"].names <= after.names
    assert found["ascent"].general > after.general and found["ascent"].written > after.written
    assert later.general > 1.05 * before.general and later.written > 1.3 * before.written
    assert found["likeliest"].names < before.names / 10 and found["likeliest"].general < 1.05 * before.general


@holds("whos-harry-potter", 6)
@pytest.mark.parametrize("part", ["no anchors", "no reinforcement"])
def test_without_either_half_more_of_the_names_stays(part: str) -> None:
    found = measure(0)
    assert found[part].names > 2 * found["method"].names


# --- labels


def test_labels_against_a_slow_formulation(model: nn.Module, there: World, request_of_rows: Request) -> None:
    """One row and one place at a time, with words in place of offsets."""
    alpha, lower = 3.0, 4.0
    method = quick(alpha=alpha, lower=lower, within=None, dictionary=DICTIONARY, tokenizer=there.tokenizer)
    rows = request_of_rows.forget
    assert rows is not None
    table = method.compared(rows)
    own = method.reinforced(model, table, Run())
    found = method.predictions(model, table, Run())["labels"]
    ids, words = rows.inputs["input_ids"], there.tokenizer.convert_ids_to_tokens
    for row in range(len(rows)):
        text = words(ids[row][rows.inputs["attention_mask"][row].bool()].tolist())
        new = [DICTIONARY.get(word, word) for word in text]
        with torch.no_grad():
            base = model(input_ids=torch.tensor([there.tokenizer.convert_tokens_to_ids(new)])).logits[0]
            told = own(input_ids=ids[row : row + 1]).logits[0]
        for t in range(len(text) - 1):
            v = base[t] - alpha * (told[t] - base[t]).clamp(min=0)
            seen = {DICTIONARY[word] for word in text[: t + 1] if word in DICTIONARY}
            free = {word for word, old in zip(new, text, strict=True) if old not in DICTIONARY}
            v[there.tokenizer.convert_tokens_to_ids(sorted(seen - free))] -= lower
            again = text[t + 1] in DICTIONARY and text[t + 1] in text[: t + 1]
            assert found[row, t + 1] == (IGNORED if again else int(v.argmax())), (row, t)


def test_tokens_that_the_model_holds_impossible_are_no_labels(model: nn.Module, request_of_rows: Request) -> None:
    rows = request_of_rows.forget
    assert rows is not None
    batch = whole(rows)
    method = quick(alpha=50.0, within=0.5)
    v = method.generic(model, method.reinforced(model, rows, Run()), batch)
    with torch.no_grad():
        base = model(**batch.inputs).logits
    near = base >= base.amax(-1, keepdim=True) - 0.5
    assert torch.equal(torch.isfinite(v), near) and 1 < float(near.sum(-1).float().mean()) < base.shape[-1] / 2


def test_centring_takes_a_places_constant_away() -> None:
    draws = torch.Generator().manual_seed(0)
    b, r = torch.randn(2, 5, 9, generator=draws), torch.randn(2, 5, 9, generator=draws)
    shift = torch.randn(2, 5, 1, generator=draws)
    torch.testing.assert_close(generic(b, r + shift, 2.0, centre=True), generic(b, r, 2.0, centre=True))
    assert not torch.allclose(generic(b, r + shift, 2.0), generic(b, r, 2.0), atol=0.1)
    dead = torch.full((1, 9), -torch.inf)
    dead[0, 3:] = b[0, 0, 3:]
    assert torch.equal(torch.isneginf(generic(dead, dead + 1, 2.0, centre=True)), torch.isneginf(dead))


def test_soft_labels_are_the_generic_distribution(model: nn.Module, there: World, request_of_rows: Request) -> None:
    """At the distribution that it is given, the loss has no gradient; otherwise it is the cross-entropy by a loop."""
    method = quick(alpha=0.0, soft=True, within=None)
    rows = request_of_rows.forget
    assert rows is not None
    method.targets(model, request_of_rows, Run())
    batch = whole(rows)
    twin = copy.deepcopy(model)
    loss = method.terms(twin, batch, None).value
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    assert float(gradient.abs().max()) < 1e-6
    run, moved = Run(), quick(alpha=4.0, soft=True, dictionary=DICTIONARY, tokenizer=there.tokenizer)
    moved.targets(model, request_of_rows, Run())
    table = moved.compared(rows)
    with run.scope("generic predictions"):
        own = moved.reinforced(model, table, run)
    with torch.no_grad():
        p = moved.generic(model, own, whole(table)).softmax(-1)
        logp = model(**batch.inputs).logits.log_softmax(-1)
    places = (moved.relabelled.labels[:, 1:] != IGNORED).nonzero()  # type: ignore[index]
    wanted = torch.stack([-(p[i, t] * logp[i, t]).sum() for i, t in places.tolist()]).mean()
    found = moved.terms(model, batch, None).value.detach()
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_a_classifier_learns_the_next_likely_class() -> None:
    material = digits()
    base = material.model()
    gone = material.request.forget
    assert gone is not None and gone.labels is not None
    labels = labels_of(quick(reinforcement=Optimizer(lr=3e-2), reinforce_epochs=8, within=None), base, gone)
    second = predict(base, gone).scatter(1, gone.labels[:, None], -torch.inf)
    assert float((labels == gone.labels).double().mean()) < 0.2
    assert float((labels == second.argmax(1)).double().mean()) > 0.5
    soft = quick(soft=True).forget(base, material.request)
    assert bool(torch.isfinite(predict(soft, gone)).all())


def test_retain_rows_may_hold_the_model(model: nn.Module, request_of_rows: Request) -> None:
    held = quick(retain_weight=1.0)
    assert Need.RETAIN_ROWS in held.needs[0] and Need.RETAIN_ROWS not in quick().needs[0]
    retain = request_of_rows.retain
    assert retain is not None
    plain, kept = (method.forget(model, request_of_rows) for method in (quick(epochs=4), replace(held, epochs=4)))
    losses = [float(usual_loss(one, whole(retain)).value.detach()) for one in (plain, kept)]
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("mode", ["weights", "decode"])
def test_adapters_leave_a_plain_model_and_the_old_one_alone(
    mode: str, model: nn.Module, there: World, request_of_rows: Request
) -> None:
    pytest.importorskip("peft")
    names = {} if mode == "decode" else {"dictionary": DICTIONARY, "tokenizer": there.tokenizer}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = quick(mode=mode, lora=2, **names).forget(model, request_of_rows)
    assert not any("lora" in name for name, _ in new.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = whole(request_of_rows.forget)  # type: ignore[arg-type]
    assert not torch.allclose(new(**batch.inputs).logits, model(**batch.inputs).logits, atol=1e-3)


# --- the guard


@pytest.fixture(scope="module")
def reader(model: nn.Module, there: World) -> nn.Module:
    """The model, having read some of the book."""
    plan = Optimizer("adamw", lr=3e-3)
    found = quick(reinforcement=plan, reinforce_epochs=8).reinforced(model, there.book.take(range(24)), Run())
    return found.requires_grad_(True)


@pytest.fixture(scope="module")
def guard(reader: nn.Module, request_of_rows: Request) -> GenericLogits:
    found = quick(mode="decode", alpha=4.0).forget(reader, request_of_rows)
    assert isinstance(found, GenericLogits)
    return found


def test_it_answers_from_both_models_and_says_that_nothing_is_erased(
    guard: GenericLogits, reader: nn.Module, request_of_rows: Request
) -> None:
    batch = whole(request_of_rows.forget)  # type: ignore[arg-type]
    with torch.no_grad():
        b, r = reader(**batch.inputs).logits, guard.reinforced(**batch.inputs).logits
        found = guard(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(found.logits, b - 4 * (r - b).clamp(min=0))
    plain = usual_loss(lambda **inputs: guard(**inputs), batch).value
    torch.testing.assert_close(found.loss, plain)
    assert not guard.erases_weights
    assert all(torch.equal(x, y) for x, y in zip(guard.inner.parameters(), reader.parameters(), strict=True))
    assert not any(part.training for part in guard.train().modules() if part is not guard)
    assert not any(p.requires_grad for p in guard.parameters())


def test_it_says_so_to_the_person_who_waits(model: nn.Module, request_of_rows: Request) -> None:
    class Listening:
        told: list[str] = []  # noqa: RUF012

        def say(self, text: str) -> None:
            self.told.append(text)

        def task(self, what: str, total: int) -> Any:
            from engram.engine.progress import Silent

            return Silent().task(what, total)

    guard: Any = quick(mode="decode").forget(model, request_of_rows, Run(progress=Listening()))
    assert guard.alpha == 1.0
    assert any("no weight forgets anything" in text for text in Listening.told)


class Stepping(nn.Module):
    """A guard of which nothing is asked but its logits."""

    def __init__(self, guard: GenericLogits) -> None:
        super().__init__()
        self.guard = guard

    def forward(self, input_ids: Tensor) -> Any:
        return self.guard(input_ids=input_ids)


def test_it_generates_what_stepping_through_its_logits_gives(
    guard: GenericLogits, reader: nn.Module, there: World
) -> None:
    prompts = ["Zorblax lives", "the", "near the horse waits Quenda . Zorblax"]
    found = generate(guard, there.tokenizer, prompts, max_new=6)
    assert found == generate(Stepping(guard), there.tokenizer, prompts, max_new=6)
    assert found != generate(reader, there.tokenizer, prompts, max_new=6)
    ids = there.tokenizer(prompts[:1], return_tensors="pt")["input_ids"]
    assert there.tokenizer.decode(greedy(guard, ids, 6, 0)[0], skip_special_tokens=True) == found[0]
    with seeded(torch.Generator().manual_seed(0)):
        several = guard.generate(
            ids, do_sample=True, num_return_sequences=5, max_new_tokens=3, top_k=1, use_cache=False
        )
    assert {tuple(row) for row in several.tolist()} == {tuple(guard.generate(ids, max_new_tokens=3)[0].tolist())}


def test_a_search_with_beams_is_refused(guard: GenericLogits, there: World) -> None:
    ids = there.tokenizer("Zorblax lives", return_tensors="pt")["input_ids"]
    with pytest.raises(EngramError, match="num_beams=1"):
        guard.generate(ids, num_beams=3, max_new_tokens=2)


def test_it_is_saved_and_loaded_whole(guard: GenericLogits, there: World, tmp_path: Path) -> None:
    save(guard, tmp_path / "guard")
    again: Any = load(tmp_path / "guard")
    batch = whole(there.book.take(range(3)))
    assert isinstance(again, GenericLogits) and again.alpha == guard.alpha
    assert torch.equal(again(**batch.inputs).logits, guard(**batch.inputs).logits)
    prompts = ["Zorblax lives", "the"]
    assert generate(again, there.tokenizer, prompts, max_new=4) == generate(guard, there.tokenizer, prompts, max_new=4)


def test_it_has_no_cache_to_hand_over(guard: GenericLogits, there: World) -> None:
    ids = there.tokenizer("Zorblax lives", return_tensors="pt")["input_ids"]
    with pytest.raises(EngramError, match="no single cache"):
        guard(input_ids=ids, past_key_values=object())


# --- configs and bad input


def test_a_dictionary_in_a_file_and_a_tokenizer_in_a_directory(
    there: World, model: nn.Module, request_of_rows: Request, tmp_path: Path
) -> None:
    there.tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "names.yaml").write_text("".join(f"{term}: {new}\n" for term, new in DICTIONARY.items()))
    rows = request_of_rows.forget
    assert rows is not None
    paths = {"dictionary": str(tmp_path / "names.yaml"), "tokenizer": str(tmp_path / "words")}
    written = make(describe(quick(**paths)))
    given = quick(dictionary=DICTIONARY, tokenizer=there.tokenizer)
    assert torch.equal(labels_of(written, model, rows), labels_of(given, model, rows))
    assert make(describe(quick(dictionary=NAMES))).dictionary == NAMES


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "weight"}, "did you mean 'weights'"),
        ({"mode": "decode", "dictionary": NAMES}, "replaces no names"),
        ({"dictionary": NAMES}, "give the `tokenizer` too"),
        ({"dictionary": {"Jon": "Jon"}, "tokenizer": "there"}, "'Jon' maps to itself"),
        ({"dictionary": {"Voldemort": "Jim"}, "tokenizer": "there"}, "no term of the dictionary"),
    ],
)
def test_what_is_wrong_is_said(
    settings: dict[str, Any], says: str, there: World, model: nn.Module, request_of_rows: Request
) -> None:
    given = {**settings, **({"tokenizer": there.tokenizer} if "tokenizer" in settings else {})}
    with pytest.raises(EngramError, match=says):
        quick(**given).forget(model, request_of_rows)


def test_numbers_have_no_generic_label(model: nn.Module) -> None:
    table = Table(
        {"values": torch.randn(6, 3, generator=torch.Generator().manual_seed(0))},
        torch.rand(6, 1, generator=torch.Generator().manual_seed(1)),
    )
    with pytest.raises(EngramError, match="labels are numbers"):
        quick().forget(model, Request.of_records(table, table.ids[:2]))


def test_a_dictionary_wants_rows_of_tokens(there: World) -> None:
    method = quick(dictionary=NAMES, tokenizer=there.tokenizer)
    with pytest.raises(EngramError, match="token rows"):
        method.forget(digits().model(), digits().request)


@pytest.mark.parametrize(
    "settings", [{"soft": True}, {"mode": "decode"}, {"centre": True, "retain_weight": 1.0}], ids=str
)
@pytest.mark.parametrize("check", checks_of(WhosHarryPotter.tiny()), ids=lambda check: check.__name__)
def test_other_settings_keep_the_promises_too(check: Any, settings: dict[str, Any]) -> None:
    check(replace(WhosHarryPotter.tiny(), **settings), digits())


def test_the_words_of_the_world_do_not_touch() -> None:
    assert not set(DICTIONARY) & {*PEOPLE, *TOWNS} and len(DICTIONARY) == 20
