"""Encoders that are never trained: the features of a given model, and random features of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.models.build import build
from engram.models.encoders import Encoder, Identity
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.split import split


class SplitFeatures(Encoder):
    """What a given classifier feeds to its last layer, as an encoder."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.width = split(inner).width

    def forward(self, **inputs: Any) -> Output:
        return Output(pooler_output=split(self.inner).features(**inputs).flatten(1))


class RandomFeatures(Encoder):
    """phi(x) = ReLU(B g(x)): `size` random features of an encoder g; B is a buffer and stays as it was drawn.

    B has the distribution of a linear layer's initial weights, U(-1/sqrt(d), 1/sqrt(d)), and no bias. It is
    float64, so that a row computed anew has the features that it had, whatever else is in its batch.
    """

    weight: Tensor

    def __init__(self, encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.encoder, self.size, self.width = encoder, size, size
        d = int(encoder.width)  # type: ignore[arg-type]
        self.register_buffer("weight", (torch.rand(size, d, dtype=torch.float64) * 2 - 1) / d**0.5)

    def forward(self, **inputs: Any) -> Output:
        features: Tensor = self.encoder(**inputs).pooler_output
        return Output(pooler_output=torch.relu(features.to(self.weight) @ self.weight.T))


def frozen_encoder(backbone: Any, *, inputs: Mapping[str, Sequence[int]], generator: torch.Generator) -> nn.Module:
    """A copy of a backbone's encoder in eval mode, without gradients.

    `backbone`: None takes the rows as they are (stored features, pixels); a module, a model directory or a
    name is built by `models.build`; of a classifier, what comes before the last layer is taken.
    """
    if backbone is None:
        encoder: nn.Module = Identity(**Identity.fitting(inputs))
    else:
        model = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else None
        model = model or build(backbone, inputs=inputs, generator=generator)
        encoder = _encoder_of(model)
    return encoder.eval().requires_grad_(False)


def _encoder_of(model: nn.Module) -> nn.Module:
    if isinstance(model, Predictor):
        return model.encoder
    return model if isinstance(model, Encoder) else SplitFeatures(model)
