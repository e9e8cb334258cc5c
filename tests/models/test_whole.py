"""Predictor, build, split, guards, tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engram.models
from engram.errors import EngramError
from engram.models import Identity, Output, Predictor, ValueHead, Wrapper, digest, replaced, save
from engram.models.build import build
from engram.models.split import split

Make = Callable[..., Any]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=gen(seed))


# predictor


def test_classification_ignores_rows_without_a_label(predictor: Predictor) -> None:
    x, labels = normal(4, 5), torch.tensor([4, -1, 1, 4])
    out = predictor(values=x, labels=labels, task=torch.zeros(4))
    rows = torch.tensor([0, 2, 3])
    logp = out.logits[rows][:, [1, 4]].log_softmax(1)
    expected = -(logp[0, 1] + logp[1, 0] + logp[2, 1]) / 3
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logits, predictor.head(predictor.features(values=x)))
    assert predictor(values=x).loss is None
    empty = predictor(values=x, labels=torch.full((4,), -1)).loss
    assert empty == 0


def test_regression_is_the_mean_squared_error(make: Make) -> None:
    model = make(lambda: Predictor(Identity(3), ValueHead(3, 2)))
    x, y = normal(4, 3), normal(4, 2, seed=2)
    out = model(values=x, labels=y)
    torch.testing.assert_close(out.loss, ((out.logits - y) ** 2).sum() / 8)
    one = make(lambda: Predictor(Identity(3), ValueHead(3, 1)))
    y = normal(4, seed=2)
    out = one(values=x, labels=y)  # [B] is not spread over [B, 1]
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - y) ** 2).mean())


# build


@pytest.mark.parametrize(
    ("spec", "inputs", "expected"),
    [
        ("MLP", {"values": (7,)}, {"class": "MLP", "inputs": 7}),
        ({"name": "MLP", "hidden": [4]}, {"pixel_values": (1, 8, 8)}, {"inputs": 64, "hidden": [4]}),
        ("ConvNet", {"pixel_values": (2, 8, 8)}, {"channels": 2}),
        ("Identity", {"values": (7,)}, {"width": 7}),
        ("ResNet20", {"pixel_values": (3, 32, 32)}, {"class": "ResNet", "blocks": 3}),
        ("ResNet56", {"pixel_values": (1, 32, 32)}, {"class": "ResNet", "blocks": 9, "channels": 1}),
        ({"name": "ViT", "width": 8}, {"pixel_values": (3, 8, 8)}, {"image_size": 8, "width": 8}),
        ({"name": "CCT", "depth": 1}, {"pixel_values": (1, 8, 8)}, {"channels": 1, "image_size": 8}),
    ],
)
def test_what_the_data_determine_is_filled_in(
    spec: Any, inputs: Mapping[str, tuple[int, ...]], expected: dict[str, Any]
) -> None:
    model = build(spec, inputs=inputs, classes=[2, 0], generator=gen())
    assert isinstance(model, Predictor)
    described = model.describe()["encoder"]
    assert {key: described[key] for key in expected} == expected
    rows = {name: normal(2, *shape) for name, shape in inputs.items()}
    logits = model.eval()(**rows).logits
    assert torch.isfinite(logits).tolist() == [[True, False, True]] * 2


def test_building_follows_the_generator_alone(moved_by: Callable[[Callable[[], object]], list[str]]) -> None:
    def built(seed: int) -> str:
        return digest(build("MLP", inputs={"values": (3,)}, classes=range(2), generator=gen(seed)))

    first = built(1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(77)
        assert built(1) == first
    assert built(2) != first
    assert moved_by(lambda: built(3)) == []


def test_the_other_forms_of_a_spec(predictor: Predictor, tmp_path: Path) -> None:
    inputs = {"values": (5,)}
    copied = build(predictor, inputs=inputs, generator=gen())
    assert copied is not predictor
    assert digest(copied) == digest(predictor)
    save(predictor, tmp_path / "model")
    assert digest(build(tmp_path / "model", inputs=inputs, generator=gen())) == digest(predictor)
    assert digest(build(str(tmp_path / "model"), inputs=inputs, generator=gen())) == digest(predictor)
    values: Any = build("MLP", inputs=inputs, outputs=3, generator=gen())
    assert values.head.config == {"width": 128, "outputs": 3}


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        ("ConvNett", {"values": (3,)}, "unknown model.*'ConvNett'; did you mean 'ConvNet'"),
        ({"hidden": [3]}, {"values": (3,)}, "unknown model.*'None'"),
        ({"name": "MLP", "hiden": [3]}, {"values": (3,)}, "MLP cannot be built:.*'hiden'"),
        ("ConvNet", {"values": (3,)}, "ConvNet reads pixel_values; there is values"),
        ("MLP", {"input_ids": (3,)}, "MLP reads values or pixel_values; there is input_ids"),
        ("ViT", {"pixel_values": (3, 8, 4)}, "square images; these are 8×4"),
    ],
)
def test_specs_that_cannot_be_built(spec: Any, inputs: Any, message: str) -> None:
    with pytest.raises(EngramError, match=message):
        build(spec, inputs=inputs, generator=gen())


# split


class TimmStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.num_features = nn.Linear(4, 3), nn.Linear(3, 2), 3

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.relu() if pre_logits else self.fc(x.relu())

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def bert(make: Make) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return make(BertForSequenceClassification, config).eval()


def test_features_and_head_make_the_model_again(predictor: Predictor, tiny_vit: nn.Module, make: Make) -> None:
    timm = make(TimmStyle)
    images, ids = normal(2, 3, 8, 8), torch.tensor([[1, 2, 3], [4, 5, 6]])
    cases: list[tuple[nn.Module, dict[str, Tensor], Tensor, int]] = [
        (predictor, {"values": normal(2, 5)}, predictor(values=normal(2, 5)).logits, 8),
        (tiny_vit, {"pixel_values": images}, tiny_vit(pixel_values=images).logits, 16),
        (text := bert(make), {"input_ids": ids}, text(input_ids=ids).logits, 8),
        (timm, {"pixel_values": normal(2, 4)}, timm(normal(2, 4)), 3),
    ]
    for model, inputs, logits, width in cases:
        parts = split(model)
        features = parts.features(**inputs)
        assert features.shape == (2, width)
        assert parts.width == width
        torch.testing.assert_close(parts.head(features), logits)
        assert features.requires_grad


def test_splitting_leaves_no_hook_behind(tiny_vit: nn.Module) -> None:
    parts = split(tiny_vit)
    with pytest.raises(ValueError, match="size"):
        parts.features(pixel_values=normal(1, 3, 4, 4))
    parts.features(pixel_values=normal(1, 3, 8, 8))
    assert not parts.head._forward_pre_hooks


def test_models_that_cannot_be_split(tiny_gpt: nn.Module) -> None:
    for model in (nn.Sequential(), tiny_gpt):
        with pytest.raises(EngramError, match=r"cannot split .*; supported: .*timm-style"):
            split(model)


# guards


class Shift(Wrapper):
    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__(inner)
        self.by = by

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "values": inputs["values"] + self.by}

    def after(self, inputs: dict[str, Any], output: Output) -> Output:
        return Output(logits=2 * output.logits, extra={"seen": inputs["values"]})


def test_a_guard_acts_before_and_after(predictor: Predictor) -> None:
    guard = Shift(predictor, 0.5)
    x = normal(2, 5)
    out = guard(values=x)
    assert torch.equal(out.logits, 2 * predictor(values=x + 0.5).logits)
    assert torch.equal(out.extra["seen"], x + 0.5)
    assert guard.describe() == {"class": "Shift", "inner": predictor.describe(), "by": 0.5}
    assert Shift.erases_weights is False


def test_the_inner_model_is_frozen_and_shares_its_memory(predictor: Predictor) -> None:
    predictor.train()
    guard = Wrapper(predictor).train()
    assert not guard.inner.training
    assert not any(weight.requires_grad for weight in guard.parameters())
    assert predictor.training
    assert all(weight.requires_grad for weight in predictor.parameters())
    theirs = dict(guard.inner.named_parameters())
    assert all(weight.data_ptr() == theirs[name].data_ptr() for name, weight in predictor.named_parameters())


class Swap(Wrapper):
    """Reads every prompt as token 3."""

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 3)}


def test_a_guarded_language_model_generates(tiny_gpt: Any) -> None:
    guard, prompt = Swap(tiny_gpt), torch.tensor([[5, 6]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    guarded = guard.generate(prompt, **options)
    assert torch.equal(guarded, tiny_gpt.generate(torch.tensor([[3, 3]]), **options))
    assert guard.config is guard.inner.config
    assert guard.config.n_embd == 16
    assert guard.get_input_embeddings() is guard.inner.get_input_embeddings()


# tokens


def test_embeddings_are_replaced_inside_the_block_only(tiny_gpt: Any) -> None:
    ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    table = tiny_gpt.get_input_embeddings()
    before = tiny_gpt(input_ids=ids).logits
    new = table.weight[other].detach().requires_grad_()
    with replaced(tiny_gpt, new):
        edited = tiny_gpt(input_ids=ids).logits
    torch.testing.assert_close(edited, tiny_gpt(input_ids=other).logits)
    gradient = torch.autograd.grad(edited.sum(), new)[0]
    assert gradient.abs().sum() > 0
    assert torch.equal(tiny_gpt(input_ids=ids).logits, before)
    with replaced(tiny_gpt, lambda old: old.zero_()):
        tiny_gpt(input_ids=ids)
    assert torch.equal(tiny_gpt(input_ids=ids).logits, before)
    assert not table._forward_hooks


def test_replacing_for_generation_touches_the_prompt_only(tiny_gpt: Any) -> None:
    ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    new = tiny_gpt.get_input_embeddings()(other)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = tiny_gpt.generate(other, **options)[:, 3:]
    with replaced(tiny_gpt, new, prefill_only=True):
        assert torch.equal(tiny_gpt.generate(ids, **options)[:, 3:], expected)
    with pytest.raises(EngramError, match="prefill_only=True"), replaced(tiny_gpt, new):
        tiny_gpt.generate(ids, **options)
    assert not tiny_gpt.get_input_embeddings()._forward_hooks


def test_a_model_without_tokens(predictor: Predictor) -> None:
    with pytest.raises(EngramError, match="no get_input_embeddings"), replaced(predictor, torch.zeros(1)):
        pass


# the package


def test_public_names_exist_and_hide_no_module() -> None:
    folder = Path(engram.models.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")}
    for name in engram.models.__all__:
        assert getattr(engram.models, name).__name__ == name
        assert name not in modules
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        engram.models.Nothing  # noqa: B018
