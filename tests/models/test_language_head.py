"""A head of fixed vectors: its formula, who may change what, and how it comes to stand in any classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.engine.teacher import untrained
from engram.errors import EngramError
from engram.models import MLP, Head, LinearHead, Predictor, ValueHead, load, pack, save, seeded, unpack
from engram.models.language_head import LanguageHead, Mapped, visual


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(*classes: int, seed: int = 0, **options: Any) -> LanguageHead:
    head = LanguageHead(6, **options)
    head.know(classes, normal(len(classes), 6, seed=seed))
    head.grow(classes, None)
    return head


def test_logits_are_scaled_cosines() -> None:
    head, f, w = told(4, 1, scale=20.0), normal(5, 6, seed=1), normal(2, 6)
    wanted = torch.full((5, 5), -torch.inf)
    for row in range(5):
        for place, label in enumerate((4, 1)):
            wanted[row, label] = 20 * float(f[row].double() @ w[place].double() / f[row].norm() / w[place].norm())
    assert torch.allclose(head(f), wanted, rtol=0, atol=1e-5)


def test_rows_are_a_buffer_of_unit_length_without_bias_or_parameter() -> None:
    head = told(0, 2)
    assert list(head.parameters()) == [] and "weight" in dict(head.named_buffers())
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)
    head.requires_grad_(True)
    assert not head.weight.requires_grad


def test_more_classes_do_not_show_in_the_logits_of_the_first() -> None:
    head, f = told(0, 1, 2), normal(64, 6, seed=9)
    before = head(f)
    head.know(range(3, 50), normal(47, 6, seed=4))
    head.grow(range(3, 50), None)
    assert torch.equal(head(f)[:, :3], before) and before.dtype == torch.float32


def test_a_live_class_keeps_its_row_and_a_retired_one_is_told_anew() -> None:
    head = told(0, 1)
    before = head.weight.clone()
    head.know([0, 3, 1], normal(3, 6, seed=2))
    head.grow([0, 3, 1], None)
    assert torch.equal(head.weight[:2], before) and head.classes.tolist() == [0, 1, 3]
    head.retire([1])
    assert not head.weight[1].any() and torch.isneginf(head(normal(1, 6))[0, 1])
    with pytest.raises(EngramError, match="the vector of class 1's name; call know"):
        head.grow([1], None)
    head.know([1], normal(2, 6)[1:])
    head.grow([1], None)
    assert torch.allclose(head.weight[:2], before, rtol=0, atol=1e-7)
    assert head.live.tolist() == [True, True, False, True]


def test_what_is_known_is_not_predicted_before_it_is_grown() -> None:
    head = told(0)
    head.know([1], normal(1, 6, seed=3))
    assert head(normal(4, 6)).shape == (4, 2) and torch.isneginf(head(normal(4, 6))[:, 1]).all()


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (normal(2, 6), r"the vectors are \[2, 6\]; 1 classes need \[1, 6\]"),
        (normal(1, 5), r"the vectors are \[1, 5\]"),
        (torch.zeros(1, 6), "the vector of class 7 is 0"),
        (torch.full((1, 6), torch.nan), "not finite"),
    ],
)
def test_vectors_without_direction_are_refused(vectors: Tensor, says: str) -> None:
    with pytest.raises(EngramError, match=says):
        LanguageHead(6).know([7], vectors)


def test_a_scale_that_is_no_scale_is_refused() -> None:
    with pytest.raises(EngramError, match="has to be above 0, not 0"):
        LanguageHead(6, scale=0.0)


def test_the_scale_can_be_learnt_and_starts_anew() -> None:
    head = told(0, 1, scale=10.0, learn_scale=True)
    f = normal(3, 6, seed=1)
    assert torch.allclose(head(f), told(0, 1, scale=10.0)(f), rtol=1e-6)
    loss = F.cross_entropy(head(f), torch.tensor([0, 1, 0]))
    loss.backward()
    assert head.log_scale.grad is not None and head.log_scale.grad.abs() > 0
    with torch.no_grad():
        head.log_scale.fill_(0.0)
    anew = untrained(head, torch.Generator())
    assert torch.allclose(anew(f), told(0, 1, scale=10.0)(f), rtol=1e-6)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_a_model_with_a_map_is_saved_whole(learn_scale: bool, tmp_path: Path) -> None:
    with seeded(torch.Generator().manual_seed(0)):
        encoder = Mapped(MLP(5, hidden=(8,)), 8, 6)
    model = Predictor(encoder, told(3, 1, learn_scale=learn_scale)).eval()
    model.head.know([2], normal(1, 6, seed=5))
    save(model, tmp_path / "model")
    x = normal(4, 5, seed=2)
    for again in (load(tmp_path / "model"), unpack(*pack(model))):
        assert torch.equal(again(values=x).logits, model(values=x).logits)
        again.head.grow([2], None)  # type: ignore[union-attr, operator]


def test_the_map_stands_with_the_encoder() -> None:
    with seeded(torch.Generator().manual_seed(0)):
        inner = MLP(5, hidden=(8,))
        model = Predictor(Mapped(inner, 8, 6), told(0))
    x = normal(4, 5)
    assert [name for name, _ in model.named_parameters() if "map" in name] == ["encoder.map.weight"]
    assert torch.allclose(model.features(values=x), inner(values=x).pooler_output @ model.encoder.map.weight.T)


def test_any_classifier_gives_its_features_and_leaves_its_head(
    predictor: Predictor, tiny_vit: nn.Module, make: Callable[..., Any]
) -> None:
    encoder, width = visual(predictor)
    assert encoder is predictor.encoder and width == 8
    features, width = visual(tiny_vit)
    x = normal(2, 3, 8, 8)
    assert features(pixel_values=x).pooler_output.shape == (2, width) == (2, 16)
    left = {name for name, p in features.named_parameters() if not p.requires_grad}
    assert left == {"inner.classifier.weight", "inner.classifier.bias"}
    with pytest.raises(EngramError, match="class names cannot take the place of a ValueHead"):
        visual(make(lambda: Predictor(MLP(5, hidden=(8,)), ValueHead(8, 2))))
    with pytest.raises(EngramError, match="cannot split Identity"):
        visual(nn.Identity())


def test_it_is_a_head() -> None:
    assert isinstance(told(0), Head) and not isinstance(told(0), LinearHead)
