"""The compact transformer, the convolution of its attention weights, and what several tasks say together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.data.table import Table
from engram.errors import EngramError
from engram.models import load, save, seeded
from engram.models.cct import CompactTransformer, DropPath, StochasticBlock, pooled, sinusoids
from engram.models.convolved_attention import (
    PARENTLESS,
    ConvolvedTransformer,
    TaskPart,
    begun,
    convolved,
)
from engram.models.task_inference import joined, normalised_entropies
from engram.testing import holds

Make = Callable[..., Any]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed))


def small(make: Make, **settings: Any) -> CompactTransformer:
    given = {"image_size": 8, "channels": 1, "width": 8, "depth": 2, "heads": 2, **settings}
    return make(CompactTransformer, **given).eval()


def whole(make: Make, channels: int = 1, tasks: int = 3, **settings: Any) -> ConvolvedTransformer:
    """Tasks of two classes each, the first the parent of all others."""
    encoder = small(make, channels=channels)
    with seeded(draws(1)):
        parts = [begun(encoder, (2 * t, 2 * t + 1), 3, PARENTLESS if t == 0 else 0) for t in range(tasks)]
    return ConvolvedTransformer(encoder, parts, channels, **settings).eval()


# --- the transformer


def test_places_have_sines_and_cosines_of_falling_frequency() -> None:
    found = sinusoids(5, 6)
    for place in range(5):
        for i in range(6):
            angle = place / 10000 ** (2 * (i // 2) / 6)
            assert float(found[place, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


def test_the_second_sum_starts_from_the_normalised_tokens(make: Make) -> None:
    block, x = make(StochasticBlock, 8, 2, 2.0, 0.1, 0.3).eval(), normal(2, 5, 8)
    inner = F.layer_norm(x, (8,))
    q, k, v = (inner @ getattr(block.attention, part).weight.T for part in ("query", "key", "value"))
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 2
        heads.append(scores.softmax(2) @ v[..., h])
    y = F.layer_norm(x + torch.cat(heads, 2) @ block.attention.out.weight.T, (8,))
    assert torch.allclose(block(x), y + block.mlp(y), atol=1e-6)
    assert block.attention.query.bias is None and block.attention.out.bias is None


def test_pooling_is_a_weighted_mean() -> None:
    tokens = normal(2, 3, 4)
    assert torch.allclose(pooled(tokens, torch.zeros(2, 3, 1)), tokens.mean(1))
    assert torch.allclose(pooled(tokens, torch.tensor([0.0, 50.0, 0.0]).view(1, 3, 1)), tokens[:, 1])


@pytest.mark.parametrize(("convolutions", "kernel", "size", "side"), [(1, 3, 8, 4), (2, 5, 9, 3), (1, 3, 7, 4)])
def test_a_tokenizer_halves_the_image_each_time(
    make: Make, convolutions: int, kernel: int, size: int, side: int
) -> None:
    encoder = small(make, image_size=size, convolutions=convolutions, kernel=kernel)
    assert encoder.positions.shape == (side * side, 8)
    assert encoder(normal(2, 1, size, size)).pooler_output.shape == (2, 8)


def test_features_are_blocks_of_tokens_with_places_and_no_norm_before_pooling(make: Make) -> None:
    encoder, x = small(make), normal(3, 1, 8, 8)
    tokens = encoder.tokenizer(x).flatten(2).transpose(1, 2) + sinusoids(16, 8)
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.equal(encoder(x).pooler_output, pooled(tokens, encoder.pool(tokens)))


def test_a_branch_is_left_out_for_whole_rows_and_keeps_its_mean() -> None:
    part, x = DropPath(0.25), torch.ones(4000, 2, 3)
    with seeded(draws()):
        found = part(x)
    assert torch.equal(part.eval()(x), x)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert bool((found.flatten(1) == found[:, :1, 0]).all())
    assert float(found.mean()) == pytest.approx(1, abs=4 * (0.25 * 0.75 / 4000) ** 0.5 / 0.75)


def test_the_chance_rises_from_block_to_block(make: Make) -> None:
    encoder = small(make, depth=3, drop_path=0.2)
    assert [block.drop.p for block in encoder.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("settings", [{"kernel": 4}, {"width": 9, "heads": 3}, {"drop_path": 1.0}, {"heads": 3}])
def test_settings_that_cannot_be_are_refused(make: Make, settings: dict[str, Any]) -> None:
    with pytest.raises(EngramError):
        small(make, **settings)


# --- weights, convolved


def slowly(weights: Tensor, kernels: Tensor, shifts: Tensor, gates: Tensor) -> Tensor:
    """Head by head, as the method is written."""
    found = []
    for matrix, kernel, shift, gate in zip(weights, kernels, shifts, gates, strict=True):
        blocks = []
        for h, block in enumerate(matrix.chunk(len(kernel))):
            moved = F.conv2d(block[None, None], kernel[h][None, None], shift[h : h + 1], padding=kernel.shape[-1] // 2)
            blocks.append(moved[0, 0] + torch.sigmoid(gate[h]) * block)
        found.append(torch.cat(blocks))
    return torch.stack(found)


@given(
    m=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), size=st.integers(1, 3), k=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_one_grouped_convolution_is_that_of_every_head(m: int, heads: int, size: int, k: int, seed: int) -> None:
    weights = normal(m, heads * size, 6, seed=seed)
    kernels, shifts, gates = normal(m, heads, k, k, seed=seed + 1), normal(m, heads, seed=2), normal(m, heads, seed=3)
    assert torch.allclose(
        convolved(weights, kernels, shifts, gates), slowly(weights, kernels, shifts, gates), atol=1e-5
    )


@holds("contracon", 2)
def test_without_convolution_the_gate_alone_is_left() -> None:
    weights, kernels, shifts = normal(6, 8, 8), torch.zeros(6, 2, 5, 5), torch.zeros(6, 2)
    assert torch.allclose(convolved(weights, kernels, shifts, torch.full((6, 2), 20.0)), weights, atol=1e-6)
    assert torch.equal(convolved(weights, kernels, shifts, torch.zeros(6, 2)), 0.5 * weights)


@holds("contracon", 4)
def test_a_kernel_with_one_in_its_middle_is_the_identity_and_heads_are_apart() -> None:
    weights, kernels, shifts = normal(3, 8, 8), torch.zeros(3, 2, 5, 5), torch.zeros(3, 2)
    kernels[:, :, 2, 2] = 1
    assert torch.allclose(convolved(weights, kernels, shifts, torch.full((3, 2), -math.inf)), weights, atol=1e-6)
    kernels, gates = normal(3, 2, 5, 5, seed=1), torch.ones(3, 2)
    other = weights.clone()
    other[:, :4] += 1
    before, after = (convolved(w, kernels, shifts, gates) for w in (weights, other))
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert bool((before[:, :4] != after[:, :4]).all())


@holds("contracon", 3)
@pytest.mark.parametrize(("width", "depth", "heads", "kernel", "wanted"), [(8, 2, 2, 3, 132), (256, 6, 4, 15, 16344)])
def test_the_convolutions_have_as_many_numbers_as_the_paper_counts(
    make: Make, width: int, depth: int, heads: int, kernel: int, wanted: int
) -> None:
    encoder = small(make, width=width, depth=depth, heads=heads)
    with seeded(draws()):
        part = begun(encoder, (0, 1), kernel, 0)
    count = part.kernels.numel() + part.shifts.numel() + part.gates.numel()
    assert count == depth * 3 * heads * (kernel**2 + 2) == wanted
    if width == 256:
        assert count < 0.02 * 3 * depth * width**2
    rest = sum(p.numel() for p in part.parameters()) - count
    assert rest == 4 * depth * width + width + 1 + 2 * width + 2  # norms, pooling, head


def test_a_part_starts_with_untouched_norms_and_open_gates(make: Make) -> None:
    encoder = small(make)
    with seeded(draws()):
        part = begun(encoder, (4, 2, 4), 3, 0)
    named = dict(encoder.named_parameters())
    assert len(encoder.tuned) == 2 * 4 + 2
    assert all(torch.equal(own, named[name]) for own, name in zip(part.own, encoder.tuned, strict=True))
    assert bool((part.gates == 1).all()) and float(part.kernels.detach().abs().max()) <= 1 / 3
    assert part.head.classes.tolist() == [2, 4]
    with pytest.raises(EngramError, match="odd"):
        begun(encoder, (0,), 4, 0)


# --- the whole


def test_a_tasks_network_is_the_encoder_with_its_weights_put_in(make: Make) -> None:
    model, x = whole(make), normal(3, 1, 8, 8)
    part: Any = model.parts[1]
    encoder = small(make)
    encoder.load_state_dict(model.encoder.state_dict())
    attention = slowly(model.attention(0), part.kernels, part.shifts, part.gates)
    with torch.no_grad():
        for name, value in [*zip(encoder.attention_weights, attention, strict=True)]:
            encoder.get_parameter(name).copy_(value)
        for name, value in zip(encoder.tuned, part.own, strict=True):
            encoder.get_parameter(name).copy_(value)
        assert torch.allclose(model.features(1, x), encoder(x).pooler_output, atol=1e-6)
        told = model(x, task=torch.tensor([1, 1, 0])).logits
    assert torch.allclose(told[:2, 2:4], part.head.scores(encoder(x).pooler_output)[:2], atol=1e-6)
    assert told.isfinite().tolist() == [[False, False, True, True, False, False]] * 2 + [[True, True] + [False] * 4]


def test_a_parent_may_be_a_later_task(make: Make) -> None:
    model = whole(make, tasks=2)
    with seeded(draws(5)):
        part = begun(model.encoder, (4, 5), 3, 1)
    model.parts.append(part)
    wanted = slowly(model.attention(1), part.kernels, part.shifts, part.gates)
    assert torch.allclose(model.attention(2), wanted, atol=1e-6)


def test_entropies_by_hand() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    found = normalised_entropies(torch.stack([p.log(), torch.tensor([0.0, 0.0, -math.inf])]))
    wanted = -sum(q * math.log(q + 1e-4) for q in p.tolist()) / math.log(3)
    assert found.tolist() == pytest.approx([wanted, -math.log(0.5 + 1e-4) / math.log(2)], abs=1e-6)
    dead = -math.inf
    assert normalised_entropies(torch.tensor([[3.0, dead], [dead, dead]])).tolist() == [1.0, math.inf]


@given(seed=st.integers(0, 999))
def test_the_surest_task_wins_and_within_a_task_nothing_changes(seed: int) -> None:
    every = torch.full((4, 3, 6), -math.inf)
    for t in range(3):
        every[:, t, 2 * t : 2 * t + 2] = 10 * normal(4, 2, seed=seed + t)
    entropies = torch.rand(4, 3, generator=draws(seed))
    logits = joined(every, entropies)
    best = entropies.argmin(1)
    rows = torch.arange(4)
    assert torch.equal(logits.argmax(1), every[rows, best].argmax(1))
    for t in range(3):
        own = slice(2 * t, 2 * t + 2)
        assert torch.allclose(logits[:, own].softmax(1), every[:, t, own].softmax(1), atol=1e-5)


def test_a_class_of_two_tasks_is_told_by_the_surer_one() -> None:
    dead = -math.inf
    every = torch.tensor([[[0.0, 1.0, dead], [dead, 3.0, 1.0]]])
    found = joined(every, torch.tensor([[0.9, 0.2]]))
    assert found[0].tolist() == pytest.approx([-1.9, -0.2, -2.2])
    none = joined(torch.full((1, 1, 2), dead), torch.tensor([[math.inf]]))
    assert none.tolist() == [[dead, dead]]


def test_the_task_is_inferred_from_mean_logits_over_views(make: Make) -> None:
    model, x = whole(make, plain=6, augmented=10, noise=0.5, seed=3), normal(2, 1, 8, 8)
    with torch.no_grad():
        found = model(x)
        for t in range(3):
            views = [x] * 6 + [x + one for one in model.disturbance]
            part: Any = model.parts[t]
            mean = torch.stack([part.head.scores(model.features(t, view)) for view in views]).mean(0)
            p = mean.softmax(1)
            wanted = -(p * (p + 1e-4).log()).sum(1) / math.log(2)
            assert torch.allclose(found.extra["entropies"][:, t], wanted, atol=1e-5)
    assert model.disturbance.shape == (10, 1, 8, 8)
    assert float(model.disturbance.std()) == pytest.approx(0.5, rel=0.1)


def test_images_in_colour_are_changed_by_the_policy_within_their_range(make: Make) -> None:
    model, x = whole(make, channels=3), torch.rand(2, 3, 8, 8, generator=draws()) * 4 - 1
    table = Table({"pixel_values": x}, torch.tensor([0, 1]), ("a", "b"))
    model.standardise(table)
    assert (float(model.low), float(model.high)) == (float(x.min()), float(x.max()))
    assert torch.allclose(model.mean, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model.deviation, x.std((0, 2, 3), correction=0), atol=1e-6)
    views = list(model._views(x, model._standard(x)))
    assert len(views) == len(model.steps) == 10 and not len(model.disturbance)
    for view, steps in zip(views, model.steps, strict=True):
        raw = view * model.deviation[:, None, None] + model.mean[:, None, None]
        assert float(raw.min()) >= float(model.low) - 1e-5 and float(raw.max()) <= float(model.high) + 1e-5
        assert steps or torch.allclose(raw, x, atol=1e-5)
    assert any(not torch.allclose(view, views[0]) for view in views[1:])


def test_classes_can_be_retired(make: Make) -> None:
    model, x = whole(make), normal(3, 1, 8, 8)
    model.retire([2, 3, 4])
    with torch.no_grad():
        found = model(x)
    assert found.logits.isfinite().tolist() == [[True, True, False, False, False, True]] * 3
    assert found.extra["entropies"][:, 1].tolist() == [math.inf] * 3
    assert not bool(found.logits.isnan().any())


def test_gradients_of_the_joined_logits_are_finite(make: Make) -> None:
    model = whole(make)
    loss = model(normal(3, 1, 8, 8), labels=torch.tensor([0, 3, -1])).loss
    loss.backward()
    grads = [p.grad for p in model.parts.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)


def test_other_images_are_refused(make: Make) -> None:
    model = whole(make)
    with pytest.raises(EngramError, match="images"):
        model(normal(2, 3, 8, 8))
    with pytest.raises(EngramError, match="8×8"):
        model(normal(2, 1, 9, 9))
    with pytest.raises(EngramError, match="views"):
        whole(make, plain=0)


def test_saves_and_loads(make: Make, tmp_path: Path) -> None:
    model, x = whole(make, augmented=3), normal(2, 1, 8, 8)
    save(model, tmp_path / "m")
    again: Any = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    assert isinstance(again.parts[1], TaskPart) and again.parts[1].parent == 0
