"""Prefixes in attention, one prompt and pools of prompts over frozen encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.data.table import Batch
from engram.engine.losses import per_row
from engram.engine.persample import gradients
from engram.errors import EngramError
from engram.models import CCT, MLP, LinearHead, Predictor, ViT, digest, load, save
from engram.models.frozen import SplitFeatures
from engram.models.prompts import Prompted, PromptPool, attentions, prefixed
from engram.models.vit import Attention
from engram.testing import holds

Make = Callable[..., Any]
OWN = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 3, "heads": 2}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformers_vit(make: Make, name: str = "ViT", **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        num_labels=3, initializer_range=0.3, **more,
    )  # fmt: skip
    return make(getattr(transformers, f"{name}ForImageClassification"), config).eval()


@pytest.fixture(params=["own", "cct", "transformers", "dinov2", "eager"])
def encoder(request: pytest.FixtureRequest, make: Make) -> Any:
    """A small vision transformer of either kind, as an encoder."""
    if request.param == "own":
        return make(ViT, **OWN).eval()
    if request.param == "cct":
        return make(CCT, image_size=8, width=16, depth=3, heads=2).eval()
    name = "Dinov2" if request.param == "dinov2" else "ViT"
    more = {"attn_implementation": "eager"} if request.param == "eager" else {}
    return make(SplitFeatures, transformers_vit(make, name, **more)).eval()


def by_hand(attention: Attention, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of [B, T, width] with a prefix [length, width], row by row, head by head and token by token."""
    d = x.shape[-1] // attention.heads
    found = torch.zeros_like(x)
    for b in range(len(x)):
        q, k, v = attention.query(x[b]), attention.key(x[b]), attention.value(x[b])
        k, v = torch.cat([keys, k]), torch.cat([values, v])
        for h in range(attention.heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(x.shape[1]):
                weights = (k[:, part] @ q[t, part] / d**0.5).softmax(0)
                found[b, t, part] = weights @ v[:, part]
    return attention.out(found)


@holds("ovor", 2)
def test_a_prefix_joins_keys_and_values_and_leaves_the_number_of_tokens(make: Make) -> None:
    attention = make(Attention, 16, 2, 0.0)
    x, keys, values = normal(2, 5, 16), normal(4, 16, seed=2), normal(4, 16, seed=3)
    with prefixed(attention, {0: (keys, values)}):
        found = attention(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, by_hand(attention, x, keys, values))
    assert not torch.allclose(found, attention(x), atol=1e-2)


def copied(own: ViT, other: Any) -> None:
    """Give a transformers ViT the weights of an own one."""
    body = other.vit
    with torch.no_grad():
        body.embeddings.cls_token.copy_(own.class_token)
        body.embeddings.position_embeddings.copy_(own.positions)
        body.embeddings.patch_embeddings.projection.load_state_dict(own.patches.state_dict())
        body.layernorm.load_state_dict(own.norm.state_dict())
        for layer, block in zip(body.layers, own.blocks, strict=True):
            names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
            for theirs, ours in names.items():
                getattr(layer.attention, theirs).load_state_dict(getattr(block.attention, ours).state_dict())  # type: ignore[union-attr]
            layer.layernorm_before.load_state_dict(block.norm1.state_dict())  # type: ignore[union-attr,operator]
            layer.layernorm_after.load_state_dict(block.norm2.state_dict())  # type: ignore[union-attr,operator]
            layer.mlp.fc1.load_state_dict(block.mlp[0].state_dict())  # type: ignore[index]
            layer.mlp.fc2.load_state_dict(block.mlp[3].state_dict())  # type: ignore[index]


def test_both_kinds_of_networks_compute_the_same(make: Make) -> None:
    own, other = make(ViT, **OWN, mlp_ratio=1.0).eval(), transformers_vit(make, layer_norm_eps=1e-5)
    copied(own, other)
    images = normal(3, 3, 8, 8)
    for rows in ((normal(4, 16), normal(4, 16, seed=2)), (normal(3, 4, 16), normal(3, 4, 16, seed=2))):
        found = []
        for network in (own, SplitFeatures(other)):
            with prefixed(network, {0: rows, 2: rows}):
                found.append(network(pixel_values=images).pooler_output)
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[0], own(pixel_values=images).pooler_output, atol=1e-2)


@holds("ovor", 2)
def test_prompts_of_length_zero_leave_the_features(encoder: Any, make: Make) -> None:
    images = normal(3, 3, 8, 8)
    wanted = encoder(pixel_values=images).pooler_output
    for lengths in ((), (0, 0)):
        torch.testing.assert_close(make(Prompted, encoder, lengths)(pixel_values=images).pooler_output, wanted)
    nothing = torch.zeros(0, 16)
    with prefixed(encoder, dict.fromkeys(range(3), (nothing, nothing))):
        torch.testing.assert_close(encoder(pixel_values=images).pooler_output, wanted, atol=1e-6, rtol=1e-6)


def test_the_network_is_as_before_after_the_block(encoder: Any) -> None:
    images, rows = normal(2, 3, 8, 8), (normal(4, 16), normal(4, 16, seed=2))
    before, state = encoder(pixel_values=images).pooler_output, digest(encoder)
    configs = [getattr(m.config, "_attn_implementation", None) for m in attentions(encoder) if hasattr(m, "config")]
    with pytest.raises(ZeroDivisionError), prefixed(encoder, {1: rows}):
        assert not torch.allclose(encoder(pixel_values=images).pooler_output, before, atol=1e-4)
        raise ZeroDivisionError
    assert torch.equal(encoder(pixel_values=images).pooler_output, before)
    assert digest(encoder) == state
    after = [getattr(m.config, "_attn_implementation", None) for m in attentions(encoder) if hasattr(m, "config")]
    assert configs == after and not any(m._forward_hooks for m in encoder.modules())


def test_masked_tokens_stay_masked_and_the_prefix_is_seen_by_all(make: Make) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    bert = make(BertForSequenceClassification, config).eval()
    rows = (normal(4, 16), normal(4, 16, seed=2))
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with prefixed(bert, {0: rows, 1: rows}):
        found = bert(input_ids=ids, attention_mask=mask).logits
        alone = bert(input_ids=ids[1:, :2]).logits
    torch.testing.assert_close(found[1:], alone)
    assert not torch.allclose(alone, bert(input_ids=ids[1:, :2]).logits, atol=1e-3)


@holds("ovor", 1)
def test_the_published_prompt_has_107520_numbers(make: Make) -> None:
    body = make(ViT, image_size=8, patch_size=8, width=768, depth=5, heads=12, mlp_ratio=0.01)
    model = make(Prompted, body, (10, 10, 40, 40, 40))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 107_520
    assert all(bool(((p >= 0) & (p < 1)).all()) for p in model.prompts.values())


def passes(model: Any, images: Tensor) -> int:
    """How many images go through the inner encoder for these."""
    seen: list[int] = []
    handle = model.inner.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(len(out.pooler_output)), with_kwargs=True
    )
    model(pixel_values=images)
    handle.remove()
    return sum(seen)


@holds("ovor", 1)
def test_one_pass_a_row_for_one_prompt_and_two_for_a_pool(encoder: Any, make: Make) -> None:
    images = normal(3, 3, 8, 8)
    assert passes(make(Prompted, encoder, (4, 2)), images) == 3
    assert passes(make(PromptPool, encoder, (4, 2), 5, 2), images) == 6


def test_prompts_learn_and_the_encoder_does_not(encoder: Any, make: Make) -> None:
    model = make(PromptPool, encoder, (4, 0, 2), 5, 2).train()
    assert not any(m.training for m in model.inner.modules())
    before = digest(model.inner)
    output = model(pixel_values=normal(3, 3, 8, 8))
    (output.pooler_output.square().sum() + output.extra["likeness"].sum()).backward()
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnt == {"prompts.0", "prompts.2", "keys"}
    assert all(float(model.get_parameter(name).grad.abs().sum()) > 0 for name in learnt)  # type: ignore[union-attr]
    assert digest(model.inner) == before
    assert all(p.grad is None for p in model.inner.parameters())


def test_a_row_takes_the_prompts_whose_keys_are_most_like_its_features(encoder: Any, make: Make) -> None:
    images = normal(4, 3, 8, 8)
    model = make(PromptPool, encoder, (4, 2), 6, 2)
    found = model(pixel_values=images)
    query = encoder(pixel_values=images).pooler_output.flatten(1)
    for row in range(4):
        alike = torch.nn.functional.cosine_similarity(query[row : row + 1], model.keys)
        first, second = alike.argsort(descending=True)[:2].tolist()
        torch.testing.assert_close(found.extra["likeness"][row], alike[[first, second]])
        prefixes = {}
        for layer, length in ((0, 4), (1, 2)):
            one, other = (model.prompts[str(layer)][k] for k in (first, second))
            half = length // 2
            prefixes[layer] = (torch.cat([one[:half], other[:half]]), torch.cat([one[half:], other[half:]]))
        with prefixed(encoder, prefixes):
            wanted = encoder(pixel_values=images[row : row + 1]).pooler_output.flatten(1)
        torch.testing.assert_close(found.pooler_output[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", [False, True])
def test_saved_and_loaded_as_the_whole_predictor(encoder: Any, make: Make, tmp_path: Path, pool: bool) -> None:
    prompted = make(PromptPool, encoder, (4, 2), 5, 2) if pool else make(Prompted, encoder, (4, 0, 2))
    model = make(lambda: Predictor(prompted, LinearHead(prompted.width, classes=(2, 0)))).eval()
    save(model, tmp_path / "model")
    again: Any = load(tmp_path / "model")
    images = normal(3, 3, 8, 8)
    assert digest(again) == digest(model)
    assert torch.equal(again(pixel_values=images).logits, model(pixel_values=images).logits)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable
    assert {name.split(".")[1] for name in trainable if name.startswith("encoder")} <= {"prompts", "keys"}


def test_gradients_by_row_are_those_of_each_row_alone(encoder: Any, make: Make) -> None:
    prompted = make(Prompted, encoder, (4, 2))
    model = make(lambda: Predictor(prompted, LinearHead(prompted.width, classes=range(3)))).eval()
    images, labels = normal(3, 3, 8, 8), torch.tensor([0, 2, 1])
    rows = gradients(model, Batch({"pixel_values": images}, labels, torch.arange(3)), lambda z, y: per_row(z, y))  # type: ignore[arg-type]
    for k in range(3):
        loss = per_row(model(pixel_values=images[k : k + 1]).logits, labels[k : k + 1]).sum()
        wanted = torch.autograd.grad(loss, prompted.prompts["0"])[0]
        torch.testing.assert_close(rows["encoder.prompts.0"][k], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda vit: Prompted(vit, (4, 3)), "half of a prompt goes to the keys.*no prompt has 3 rows"),
        (lambda vit: Prompted(vit, (4, 0, 0, 2)), "no layer 3 to put a prompt into; the network has 3"),
        (lambda vit: Prompted(MLP(4), (2,)), "MLP has no attention that takes prefixes; use engram's ViT"),
        (lambda vit: PromptPool(vit, (2,), 4, 5), "takes 1 to 4 prompts of a pool of 4, not 5"),
        (lambda vit: prefixed(vit, {3: (torch.zeros(1, 16),) * 2}).__enter__(), "no layer 3"),
    ],
)
def test_what_cannot_be_done_is_said(build: Callable[[nn.Module], object], message: str, make: Make) -> None:
    vit = make(ViT, **OWN)
    with pytest.raises(EngramError, match=message):
        make(build, vit)
    assert not any(m._forward_hooks for m in vit.modules())
