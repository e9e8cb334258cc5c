"""Frozen vectors of class names as a head: what stays, what is gained, on every host that follows a gradient."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from tests.keep.halves import NEW, OLD, SMALL, halves, learnt, same, weights
from torch import Tensor, nn
from torch.nn import functional as F

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.needs import Need
from engram.core.persist import load_learner, save_learner
from engram.core.request import Request
from engram.core.settings import describe, make
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.icarl import ICaRL
from engram.keep.lingocl import LingoCL
from engram.keep.online_ewc import OnlineEWC
from engram.models import MLP, LinearHead, Predictor, ValueHead, seeded
from engram.models.language_head import LanguageHead, Mapped
from engram.reproduce import lingocl as drawn
from engram.testing import holds

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOSTS = ("Finetune", "LwF", "OnlineEWC", "MAS", "SI", "RehearsalFree", "ICaRL", "DERpp", "Replay", "MIR", "GSS")
D = 12  # width of the vectors that are given


def vectors(seed: int = 0) -> dict[str, list[float]]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(D, generator=draws).tolist() for name in NAMES}


def lingo(host: str = "Finetune", **options: Any) -> LingoCL:
    buffer = {"buffer": 40} if host in ("ICaRL", "DERpp", "Replay", "MIR", "GSS") else {}
    given: dict[str, Any] = {"encoder": vectors(), "names": NAMES, **options}
    return LingoCL(host={"name": f"keep.{host}", **SMALL, **buffer}, **given)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rows(learner: LingoCL) -> dict[int, Tensor]:
    """The vector of each class that the head knows."""
    return dict(zip(learner.head.classes.tolist(), learner.head.weight.clone(), strict=True))


# --- what must hold


@holds("lingocl", 1)
@pytest.mark.parametrize("host", HOSTS)
def test_rows_keep_their_bits_and_are_no_parameters(host: str, tiny: Table) -> None:
    learner = lingo(host)
    first, second = halves(tiny)
    learner.learn(first)
    before = rows(learner)
    assert sorted(before) == list(OLD)
    learner.learn(second)
    after = rows(learner)
    assert sorted(after) == list(OLD + NEW)
    wanted = F.normalize(torch.tensor([vectors()[name] for name in NAMES], dtype=torch.float64), dim=1)
    assert all(torch.equal(after[c], row) for c, row in before.items())
    assert all(torch.equal(after[c], wanted[c].float()) for c in range(10))
    assert not learner.head.weight.requires_grad and learner.head.weight.grad is None


@holds("lingocl", 1)
@pytest.mark.parametrize("learn_scale", [False, True])
def test_there_are_fewer_parameters_by_those_of_the_head(learn_scale: bool, tiny: Table) -> None:
    plain = trainable(learnt(Finetune(**SMALL), tiny).model)
    frozen = trainable(learnt(lingo(learn_scale=learn_scale), tiny).model)
    head, bias, width = 10 * 32, 10, 32
    assert frozen == plain - head - bias + D * width + learn_scale
    assert trainable(learnt(lingo(encoder="random"), tiny).model) == plain - head - bias


@holds("lingocl", 2)
def test_a_new_task_leaves_rows_and_logits_of_earlier_classes(tiny: Table) -> None:
    learner = lingo()
    first, second = halves(tiny)
    learner.learn(first)
    before, features = rows(learner), predict(learner.model, tiny, "pooler_output")
    logits = learner.head(features)
    learner._tell(second, Run())
    learner.head.grow(NEW, None)
    after = learner.head(features)
    assert float((after[:, :5] - logits).abs().max()) == 0.0 and after.shape == (len(tiny), 10)
    assert all(torch.equal(rows(learner)[c], row) for c, row in before.items())


@holds("lingocl", 3)
def test_lengths_of_vectors_and_features_do_not_matter(tiny: Table) -> None:
    longer = {name: [10 * x for x in vector] for name, vector in vectors().items()}
    one, other = (learnt(lingo(encoder=given), tiny) for given in (vectors(), longer))
    features = predict(one.model, tiny, "pooler_output")
    logits = one.head(features)
    assert torch.allclose(one.head(10 * features), logits, rtol=0, atol=1e-5)
    one.head.weight.mul_(10)
    assert torch.allclose(one.head(features), logits, rtol=0, atol=1e-5)
    assert all(torch.allclose(rows(other)[c], rows(one)[c] / 10, rtol=0, atol=1e-7) for c in range(10))


@pytest.fixture(scope="module")
def courses() -> dict[str, list[drawn.Course]]:
    worlds = [drawn.World(seed) for seed in range(3)]
    return {targets: [world.course(targets) for world in worlds] for targets in ("named", "trained", "shuffled")}


@holds("lingocl", 4)
def test_names_beat_a_trained_head_and_names_that_were_dealt_out_anew(courses: dict[str, list[drawn.Course]]) -> None:
    final = {targets: fmean(course.final for course in found) for targets, found in courses.items()}
    assert final["named"] > final["trained"] + 0.05
    assert final["named"] > final["shuffled"]


@holds("lingocl", 5)
def test_features_of_old_classes_turn_less(courses: dict[str, list[drawn.Course]]) -> None:
    cosine = {targets: fmean(fmean(course.cosines) for course in found) for targets, found in courses.items()}
    assert cosine["named"] > cosine["trained"] + 0.01


@holds("lingocl", 6)
def test_classes_never_learnt_are_told_apart_by_their_names() -> None:
    worlds = [drawn.World(seed) for seed in range(3)]
    named, random = (fmean(drawn.zero_shot(world, targets) for world in worlds) for targets in ("named", "random"))
    assert named > 0.1 + 0.1
    assert abs(random - 0.1) < 0.05


# --- on any host


@pytest.mark.parametrize("host", HOSTS)
def test_a_saved_learner_goes_on_the_same(host: str, tiny: Table, tmp_path: Path) -> None:
    learner = lingo(host, learn_scale=True)
    first, second = halves(tiny)
    learner.learn(first)
    learner.refresh()
    save_learner(learner, tmp_path / "one", tasks=1)
    again, twin = load_learner(tmp_path / "one")[0], fork(learner)
    for each in (learner, again, twin):
        each.learn(second)
    assert same(learner, again) and same(learner, twin)
    assert torch.equal(predict(learner.model, tiny), predict(again.model, tiny))


def test_the_host_does_what_it_does_alone(tiny: Table) -> None:
    """With the same first model, handed over as a network that ends in the frozen head already."""
    learner = lingo("OnlineEWC")
    first, second = halves(tiny)
    learner._tell(first, Run())
    learner._begin(list(range(10)), dict(enumerate(NAMES)), first, Run())
    alone = OnlineEWC(**{**SMALL, "network": copy.deepcopy(learner.model)})
    for each in (learner, alone):
        run = Run()
        for task in (first, second):
            each.learn(task, run)
    assert same(learner, alone)
    assert torch.equal(predict(learner.model, tiny), predict(alone.model, tiny))


def test_the_traces_are_those_of_the_host(tiny: Table) -> None:
    learner = learnt(lingo("Replay"), tiny)
    gone = tiny.take(range(0, len(tiny), 4))
    assert learner.traces is learner.inner.traces and learner.holds(gone.ids) == gone.ids
    assert learner.drop(gone) == gone.ids
    assert learner.holds(gone.ids) == () and not set(learner.inner.kept.table.ids) & set(gone.ids)


def test_a_forgetter_keeps_the_vectors_and_learning_goes_on(tiny: Table) -> None:
    learner = learnt(lingo("OnlineEWC"), tiny)
    before = rows(learner)
    request = Request.of_records(tiny, tiny.ids[::5])
    done = forget(learner, request, make({"name": "forget.Finetune", "epochs": 1}))
    assert set(done.residue) == set(request.ids)
    assert all(torch.equal(rows(learner)[c], row) for c, row in before.items())
    learner.learn(Task(tiny.without(request.ids)))
    assert all(torch.equal(rows(learner)[c], row) for c, row in before.items())


def test_a_class_that_was_retired_comes_back_to_its_place(tiny: Table) -> None:
    learner = learnt(lingo(), tiny)
    before = rows(learner)
    learner.head.retire([3])
    assert not rows(learner)[3].any()
    learner.learn(Task(tiny.of_classes([3, 4]), classes=(3,)))
    assert all(torch.equal(rows(learner)[c], row) for c, row in before.items())


def test_icarl_keeps_the_head_aside_and_predicts_by_means(tiny: Table) -> None:
    learner = learnt(lingo("ICaRL"), tiny)
    assert isinstance(learner.inner, ICaRL) and learner.head is learner.inner.trained
    assert not isinstance(learner.model.head, LanguageHead)
    learner.drop(tiny.of_classes([2]))
    learner.refresh()
    assert 2 not in learner.gram()[0]
    learner.learn(Task(tiny.of_classes([2]), classes=(2,)))
    assert learner.gram()[0] == tuple(range(10)) and accuracy(learner.model, tiny) > 0.3


def test_the_map_is_held_by_a_host_that_holds_parameters_and_the_scale_too(tiny: Table) -> None:
    learner = lingo("OnlineEWC", learn_scale=True)
    first, second = halves(tiny)
    learner.learn(first)
    values = weights(learner)
    learner.inner.strength = 1e9
    learner.inner._prepare(Task(first.train), Run())
    learner.inner.start(first, Run())
    assert {"encoder.map.weight", "head.log_scale"} <= set(learner.inner.pull)
    assert learner.inner.pull["head.log_scale"].shape == (1,)
    learner.inner.strength = 1.0
    learner.learn(second)
    moved = {name for name, value in values.items() if not torch.equal(value, weights(learner)[name])}
    assert {"encoder.map.weight", "head.log_scale"} <= moved


def test_any_classifier_may_be_the_network(tiny: Table) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **small)
    with seeded(torch.Generator().manual_seed(0)):
        network = ViTForImageClassification(config)
    learner = learnt(LingoCL(host=Finetune(network=network, epochs=1), encoder=vectors(), names=NAMES), tiny)
    assert learner.model(pixel_values=tiny.inputs["pixel_values"][:2]).logits.shape == (2, 10)
    assert isinstance(fork(learner).model.encoder, Mapped)


def test_a_host_may_be_given_as_it_is_and_is_not_touched(tiny: Table) -> None:
    host = Finetune(**SMALL)
    one, other = LingoCL(host=host, encoder=vectors(), names=NAMES), lingo()
    assert same(learnt(one, tiny), learnt(other, tiny)) and not host.started
    assert describe(make(json.loads(json.dumps(describe(one))))) == describe(one)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("keep.NMC", "keep.NMC trains no class head by gradient"),
        ("keep.LingoCL", "keep.LingoCL trains no class head"),
        ("keep.LFW", "unknown method 'keep.LFW'; did you mean 'keep.LwF'"),
    ],
)
def test_another_host_is_refused(host: str, says: str) -> None:
    with pytest.raises(EngramError, match=says):
        LingoCL(host=host)


def test_networks_without_one_class_head_are_refused(tiny: Table) -> None:
    with pytest.raises(EngramError, match="cannot split Routed into features and head"):
        LingoCL(host="keep.TAME", encoder="random").learn(halves(tiny)[0])
    with seeded(torch.Generator().manual_seed(0)):
        network = Predictor(MLP(64, hidden=(8,)), ValueHead(8, 2))
    with pytest.raises(EngramError, match="cannot take the place of a ValueHead"):
        LingoCL(host=Finetune(network=network), encoder="random").learn(halves(tiny)[0])
    with pytest.raises(EngramError, match="learns rows with class labels"):
        lingo().learn(Task(tiny.unlabelled()))


def test_a_model_without_the_head_is_refused(tiny: Table) -> None:
    learner = lingo()
    first, second = halves(tiny)
    with pytest.raises(EngramError, match="has learnt nothing yet"):
        learner.gram()
    learner.learn(first)
    learner.model = Predictor(learner.model.encoder, LinearHead(D))
    with pytest.raises(EngramError, match="has no head of class names any more"):
        learner.learn(second)


# --- where vectors and names come from


def test_names_come_from_the_task_or_from_the_settings(tiny: Table) -> None:
    named = [Task(task.train, None, task.index, task.classes, dict(enumerate(NAMES))) for task in halves(tiny)]
    told, learner = learnt(lingo(), tiny), lingo(names=None)
    for task in named:
        learner.learn(task)
    assert all(torch.equal(rows(told)[c], row) for c, row in rows(learner).items())
    assert told.needs == Finetune().needs
    assert learner.needs == (frozenset({Need.CLASS_NAMES}),)
    assert lingo("LwF", names=None).needs == (frozenset({Need.CLASS_NAMES, Need.BOUNDARIES}),)
    assert lingo("LwF", names=None, encoder="random").needs == (frozenset({Need.BOUNDARIES}),)


def test_names_of_classes_to_come_are_not_looked_at(tiny: Table) -> None:
    first, _ = halves(tiny)
    learner = lingo(names=None)
    names = {c: NAMES[c] for c in OLD} | dict.fromkeys(NEW, "a name that nobody has a vector for")
    learner.learn(Task(first.train, None, 0, OLD, names))
    assert learner.head.classes.tolist() == list(OLD)


def test_vectors_may_stand_in_a_file_or_under_numbers(tiny: Table, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array(list(vectors().values())))
    wanted = rows(learnt(lingo(), tiny))
    numbered = {str(c): vector for c, vector in enumerate(vectors().values())}
    for given in (str(tmp_path / "rows.npy"), numbered):
        found = rows(learnt(lingo(encoder=given, names=None), tiny))
        assert all(torch.equal(found[c], row) for c, row in wanted.items())


def test_template_and_vocabulary_reach_the_encoder(tiny: Table, tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        asked.extend(texts)
        draws = [torch.Generator().manual_seed(len(text) * 1000 + sum(map(ord, text))) for text in texts]
        return torch.stack([torch.randn(D, generator=one) for one in draws])

    (tmp_path / "words.txt").write_text("tree\n\nhouse\nriver\n")
    learner = lingo(encoder=encode, template="a photo of a {}.", vocabulary=str(tmp_path / "words.txt"))
    learner.learn(halves(tiny)[0])
    assert asked == [*(f"a photo of a {NAMES[c]}." for c in OLD), "tree", "house", "river"]
    centred = encode(["a photo of a two."]).double() - encode(["tree", "house", "river"]).double().mean(0)
    wanted = F.normalize(centred, dim=1)[0]
    assert torch.allclose(rows(learner)[2].double(), wanted, rtol=0, atol=1e-6)


def test_random_vectors_follow_the_seed_and_orthogonal_ones_stay_at_right_angles(tiny: Table) -> None:
    one, again, other = (learnt(lingo(encoder="random"), tiny, Run(seed=s)) for s in (0, 0, 1))
    assert torch.equal(one.head.weight, again.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    assert one.head.width == 32 and lingo(encoder="random", width=7).needs == Finetune().needs
    right = learnt(lingo(encoder="orthogonal", width=10, names=None), tiny)
    classes, cosines = right.gram()
    assert classes == tuple(range(10))
    assert torch.allclose(cosines, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.raises(EngramError, match="no room for 10 orthogonal vectors in width 9; raise width"):
        learnt(lingo(encoder="orthogonal", width=9), tiny)


class Heard:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Any]:
        yield lambda done: None

    def say(self, text: str) -> None:
        self.said.append(text)


def test_classes_whose_vectors_nearly_coincide_are_named_once(tiny: Table) -> None:
    close = vectors()
    close["eight"] = [x + 0.01 for x in close["three"]]
    close["one"] = [2 * x for x in close["zero"]]
    heard, quiet = Heard(), Heard()
    learnt(lingo(encoder=close), tiny, Run(progress=heard))
    learnt(lingo(), tiny, Run(progress=quiet))
    assert [text[:45] for text in heard.said] == [
        "the vectors of 'zero' and 'one' are nearly th",
        "the vectors of 'three' and 'eight' are nearly",
    ]
    assert quiet.said == []


def test_zero_shot_leaves_the_learner_alone_and_says_whose_name_it_lacks(tiny: Table) -> None:
    learner = lingo()
    learner.learn(halves(tiny)[0])
    before = predict(learner.model, tiny)
    model = learner.zero_shot(NEW)
    found = predict(model, tiny)
    assert found.shape == (len(tiny), 10) and torch.equal(found[:, :5], before)
    assert torch.equal(predict(learner.model, tiny), before) and sorted(rows(learner)) == list(OLD)
    assert torch.equal(predict(learner.zero_shot({7: "seven"}), tiny)[:, 7], found[:, 7])
    with pytest.raises(EngramError, match="there is no vector for '11'"):
        learner.zero_shot([11])
    spelt = lingo(encoder="spelling")
    spelt.learn(halves(tiny)[0])
    with pytest.raises(EngramError, match="class 11 has no name; give names"):
        spelt.zero_shot([11])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "a photo"}, "the template 'a photo' has no place {}"),
        ({"encoder": {"a": [1.0], "b": [1.0, 2.0]}}, "all of one length"),
        ({"encoder": "nowhere.npy"}, "the vectors in nowhere.npy cannot be read"),
        ({"encoder": "no/model"}, "'no/model' is no directory of a transformers model"),
        ({"encoder": "spelling", "pool": "max"}, "unknown pool 'max'"),
        ({"encoder": "spelling", "vocabulary": "no/words.txt"}, "the vocabulary no/words.txt cannot be read"),
        ({"encoder": "spelling", "whiten": True}, "whitening needs a fixed vocabulary"),
        ({"names": ["zero"]}, "there is no vector for '1' among the 10"),
        ({"names": {"first": "zero"}}, "names are given as {class number: name}, or in order"),
        ({"scale": 0.0}, "has to be above 0"),
    ],
)
def test_settings_that_cannot_be_are_named(options: Any, says: str, tiny: Table) -> None:
    with pytest.raises(EngramError, match=says):
        lingo(**options).learn(halves(tiny)[0])


@pytest.mark.parametrize("names", [["no", "1", "null", "{a}"], {0: "no", 1: "1e5", 2: "[x]"}])
def test_names_of_any_look_survive_a_config(names: Any) -> None:
    learner = LingoCL(encoder="random", names=names)
    again = make(json.loads(json.dumps(describe(learner))))
    assert describe(again) == describe(learner)
    assert list(describe(again)["names"]) == [str(x) for x in names]
