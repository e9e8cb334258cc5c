"""The residual network of the CIFAR form, and the published weights of that form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.encoders import Encoder
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.seeding import seeded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNet(Encoder):
    """He et al. (2015), arXiv:1512.03385, section 4.2: a 3×3 stem and stages of two-convolution blocks, of
    which each stage after the first halves the image; shortcuts have no parameters (subsampling, zero
    padding).

    6 * blocks + 2 layers with a head: blocks=3 is ResNet-20, blocks=9 ResNet-56. Reads `pixel_values`
    [B, channels, h, w] in [0, 1] and normalises them itself by `mean` and `std`, one number or one a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int = 3,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ) -> None:
        super().__init__()
        if not {len(mean), len(std)} <= {1, channels}:
            raise EngramError(f"mean and std need one number or {channels}; got {len(mean)} and {len(std)}.")
        self.width = widths[-1]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential(
            *(_stage(into, out, blocks, stride=1 if at == 0 else 2)
              for at, (into, out) in enumerate(zip((widths[0], *widths), widths, strict=False)))
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> Output:
        x = (pixel_values - self.mean) / self.std
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return Output(pooler_output=x.mean(dim=(-2, -1)))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))): [B, into, h, w] -> [B, out, h/stride, w/stride]."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        if out < into:
            raise EngramError(f"the shortcut of a ResNet pads channels, so widths cannot shrink ({into} to {out}).")
        self.stride, self.extra = stride, out - into
        self.conv1 = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        kept = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(kept + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def load_cifar_resnet(path: str | Path) -> Predictor:
    """A published CIFAR ResNet of the layout conv1, bn1, layerI.J.*, linear.* (safetensors), in evaluation
    mode.

    Its depth, widths and number of classes are read from the file; inputs are normalised by the ImageNet
    statistics, with which these weights were trained. Raises EngramError, naming the file, when it is not of
    that layout.
    """
    try:
        published = load_file(path)
        model = _shaped_like(published)
        model.load_state_dict(_renamed(published, model.state_dict()))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise EngramError(f"{path} is no CIFAR ResNet of the published layout: {error}") from error
    return model.eval()


def _shaped_like(published: Mapping[str, Tensor]) -> Predictor:
    stages = sorted({key.split(".")[0] for key in published if key.startswith("layer")})
    widths = [len(published[f"{stage}.0.conv1.weight"]) for stage in stages] or [len(published["conv1.weight"])]
    blocks = sum(key.startswith("layer1.") and key.endswith("conv1.weight") for key in published)
    channels, labels = published["conv1.weight"].shape[1], range(len(published["linear.bias"]))
    with seeded(torch.Generator().manual_seed(0)):
        encoder = ResNet(channels, blocks, widths, IMAGENET_MEAN, IMAGENET_STD)
        return Predictor(encoder, LinearHead(encoder.width, labels))


def _renamed(published: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the own model; counters of the batch norms and class ids are not published."""
    renamed = {
        re.sub(r"^layer(\d+)", lambda found: f"stages.{int(found[1]) - 1}", key): value
        for key, value in published.items()
        if not key.startswith("linear.")
    }
    ends = ("num_batches_tracked", ".classes", ".live")
    unpublished = {key: value for key, value in own.items() if key.endswith(ends)}
    head = {f"head.{name}": published[f"linear.{name}"] for name in ("weight", "bias")}
    return unpublished | {f"encoder.{key}": value for key, value in renamed.items()} | head


def _stage(into: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(into, out, stride)
    return nn.Sequential(first, *(ResidualBlock(out, out, 1) for _ in range(blocks - 1)))
