"""Autoencoders with one hidden layer, and a gate of several: the one that rebuilds a row best says whose it is.

The gate is that of Aljundi, Chakravarty, Tuytelaars: Expert Gate: Lifelong learning with a network of experts. CVPR
2017, arXiv 1611.06194.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import EngramError, unknown
from engram.models.config import Configured
from engram.models.output import Output

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"linear": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Autoencoder(Configured, nn.Module):
    """`inputs`: d; `code`: c; `activation` of the code and `output`: "linear", "relu" or "sigmoid".

    Initial weights come from torch's global generator, for use under `seeded`. EngramError for an unknown activation,
    and for a code of no units. A row costs O(d c).
    """

    def __init__(self, inputs: int, code: int = 100, activation: str = "relu", output: str = "linear") -> None:
        super().__init__()
        for name in (activation, output):
            if name not in ACTIVATIONS:
                raise unknown("activation of an autoencoder", name, ACTIVATIONS)
        if code < 1:
            raise EngramError(f"a code of {code} units holds nothing; give 1 or more")
        self.encoder = nn.Sequential(nn.Linear(inputs, code), ACTIVATIONS[activation]())
        self.decoder = nn.Sequential(nn.Linear(code, inputs), ACTIVATIONS[output]())

    def encode(self, x: Tensor) -> Tensor:
        """Codes [B, c] of rows [B, d]."""
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        """Rows [B, d] of codes [B, c]."""
        return self.decoder(code)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code [B, c] and the rebuilt rows [B, d] of rows [B, d]."""
        code = self.encode(x)
        return code, self.decode(code)


class AutoencoderGate(Configured, nn.Module):
    """One autoencoder a task over the features of an encoder that is never trained; a router for `Routed`.

    mean, deviation  [d] buffers by which features f are standardised; what is rebuilt is u = sigmoid((f - mean) / dev)

    Its logits [B, K] are - ||rebuilt - u||² / temperature, so that their softmax are the tasks' probabilities and their
    argmax the least error. It starts with one autoencoder or more.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, encoder: nn.Module, autoencoders: Sequence[nn.Module], temperature: float = 2.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.autoencoders = nn.ModuleList(autoencoders)
        self.temperature = temperature
        width = int(encoder.width)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def standardise(self, features: Tensor) -> None:
        """Set mean and deviation to those of features [n, d]; where they do not vary, the deviation is 1."""
        deviation, mean = torch.std_mean(features.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def squashed(self, features: Tensor) -> Tensor:
        """u of features, [n, d]."""
        return torch.sigmoid((features - self.mean) / self.deviation)

    def errors(self, u: Tensor) -> Tensor:
        """Squared error of every autoencoder on rows u [B, d], summed over d: [B, K]."""
        return torch.stack([(part(u)[1] - u).square().sum(1) for part in self.autoencoders], 1)

    def forward(self, **inputs: Any) -> Output:
        u = self.squashed(self.encoder(**inputs).pooler_output)
        return Output(logits=-self.errors(u) / self.temperature, pooler_output=u)
