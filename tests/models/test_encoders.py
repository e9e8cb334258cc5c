"""Shapes and formulas of the encoders; the published ResNet layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models import CCT, MLP, ConvNet, Identity, Predictor, ResNet, ViT, load_cifar_resnet
from engram.models.vit import Attention

Make = Callable[..., Any]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("cls", "options", "shape", "width"),
    [
        (MLP, {"inputs": 192, "hidden": (16, 7), "norm": "layer", "activation": "tanh"}, (3, 8, 8), 7),
        (MLP, {"inputs": 192, "hidden": ()}, (3, 8, 8), 192),
        (ConvNet, {"channels": 3, "widths": (4, 6)}, (3, 9, 5), 6),
        (ConvNet, {"channels": 3, "widths": (4, 6, 8), "norm": "group"}, (3, 1, 1), 8),
        (ResNet, {"blocks": 1, "widths": (4, 8)}, (3, 8, 8), 8),
        (ViT, {"image_size": 8, "width": 12, "depth": 1, "heads": 3}, (3, 8, 8), 12),
        (CCT, {"image_size": 9, "width": 12, "depth": 1, "heads": 3, "convolutions": 2}, (3, 9, 9), 12),
        (Identity, {"width": 192}, (3, 8, 8), 192),
    ],
)
def test_features_are_a_function_of_the_row_alone(
    cls: type, options: dict[str, Any], shape: tuple[int, ...], width: int, make: Make
) -> None:
    encoder = make(cls, **options).eval()
    x = normal(4, *shape)
    features = encoder(pixel_values=x).pooler_output
    assert encoder.width == width
    assert features.shape == (4, width)
    assert features.std(dim=0).max() > 1e-3  # different rows, different features
    alone = torch.cat([encoder(pixel_values=row[None]).pooler_output for row in x])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)


def test_the_mlp_is_its_formula(make: Make) -> None:
    net = make(MLP, 3, hidden=(4, 2))
    x = normal(5, 3)
    first, second = net.layers[0][0], net.layers[1][0]
    expected = F.relu(second(F.relu(first(x))))
    assert torch.equal(net(values=x).pooler_output, expected)


def test_wrong_arguments_and_inputs_are_named(make: Make) -> None:
    with pytest.raises(EngramError, match="unknown activation 'rellu'; did you mean 'relu'"):
        make(MLP, 3, activation="rellu")
    with pytest.raises(EngramError, match="unknown norm 'bach'; did you mean 'batch'"):
        make(ConvNet, norm="bach")
    with pytest.raises(EngramError, match="MLP reads 3 numbers a row; got 4"):
        make(MLP, 3)(values=normal(2, 4))
    with pytest.raises(EngramError, match="MLP needs values"):
        make(MLP, 3)()
    with pytest.raises(EngramError, match=r"images of 8×8; got 6×8"):
        make(ViT, image_size=8, width=4, depth=0, heads=1)(pixel_values=normal(1, 3, 6, 8))
    with pytest.raises(EngramError, match="4 does not divide 9"):
        make(ViT, image_size=9)
    with pytest.raises(EngramError, match="10 is not of 4"):
        make(CCT, width=10)
    with pytest.raises(EngramError, match="mean and std need one number or 1"):
        make(ResNet, channels=1, mean=(0.1, 0.2))
    with pytest.raises(EngramError, match="widths cannot shrink"):
        make(ResNet, widths=(8, 4))


def test_attention_is_softmax_of_scaled_products(make: Make) -> None:
    layer = make(Attention, 6, 2, 0.0)
    x = normal(2, 5, 6)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)))


def test_depth_and_size_of_the_residual_networks(make: Make) -> None:
    sizes = {3: 269_722 - 650, 9: 853_018 - 650}  # He et al.: 0.27 M and 0.85 M, here without the head
    for blocks, size in sizes.items():
        net = make(ResNet, blocks=blocks)
        layers = sum(isinstance(module, nn.Conv2d) for module in net.modules()) + 1
        assert layers == 6 * blocks + 2
        assert sum(weight.numel() for weight in net.parameters()) == size


def test_the_shortcut_subsamples_and_pads(make: Make) -> None:
    block = make(ResNet, blocks=1, widths=(2, 6)).stages[1][0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = normal(1, 2, 4, 4).abs()
    out = block(x)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert out[:, [0, 1, 4, 5]].abs().sum() == 0


def test_inputs_are_normalised_inside(make: Make) -> None:
    plain = make(ResNet, blocks=1, mean=(0.0,), std=(1.0,)).eval()
    scaled = make(ResNet, blocks=1, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)).eval()
    x = normal(2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    by_hand = (x - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(scaled(pixel_values=x).pooler_output, plain(pixel_values=by_hand).pooler_output)
    assert not {"mean", "std"} & scaled.state_dict().keys()


def published(model: Predictor) -> dict[str, torch.Tensor]:
    """The weights of a Predictor(ResNet, LinearHead) under the published names."""
    named = {}
    for name, value in model.encoder.state_dict().items():
        stage = name.split(".")
        if stage[0] == "stages":
            stage = [f"layer{int(stage[1]) + 1}", *stage[2:]]
        named[".".join(stage)] = value
    named = {name: value for name, value in named.items() if not name.endswith("num_batches_tracked")}
    return {**named, "linear.weight": model.head.weight.data, "linear.bias": model.head.bias.data}


def test_published_weights_are_read(make: Make, tmp_path: Path) -> None:
    from engram.models import LinearHead

    def network() -> Predictor:
        encoder = ResNet(blocks=2, widths=(4, 8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return Predictor(encoder, LinearHead(8, range(5)))

    model = make(network)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(normal(len(module.running_mean)))
    save_file(published(model), tmp_path / "w.safetensors")
    loaded = load_cifar_resnet(tmp_path / "w.safetensors")
    x = normal(3, 3, 8, 8).abs()
    assert torch.equal(loaded(pixel_values=x).logits, model.eval()(pixel_values=x).logits)
    assert loaded.describe() == model.describe()
    assert not loaded.training


@pytest.mark.parametrize("drop", ["conv1.weight", "linear.bias", "layer2.0.bn1.running_var", "layer1.0.conv1.weight"])
def test_files_of_another_layout_are_named(drop: str, make: Make, tmp_path: Path) -> None:
    from engram.models import LinearHead

    model = make(lambda: Predictor(ResNet(blocks=1, widths=(4, 8)), LinearHead(8, range(2))))
    weights = published(model)
    del weights[drop]
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(EngramError, match=r"odd\.safetensors is no CIFAR ResNet"):
        load_cifar_resnet(tmp_path / "odd.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=r"none\.safetensors"):
        load_cifar_resnet(tmp_path / "none.safetensors")
