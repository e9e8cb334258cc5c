"""A variational autoencoder of vectors: how well a vector fits those that it was trained on.

Kingma, Welling: Auto-Encoding Variational Bayes. ICLR 2014, arXiv 1312.6114.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from engram.errors import unknown

OUTPUTS: dict[str, Callable[[], nn.Module]] = {"linear": nn.Identity, "sigmoid": nn.Sigmoid}


class VAE(nn.Module):
    """`inputs`: d; `latent`: z; `hidden`: widths of the encoder's layers, which the decoder has in reverse; `output`:
    "linear", or "sigmoid" for vectors in [0, 1]^d. A ReLU after each hidden layer.

    Initial weights come from torch's global generator, for use under `seeded`. EngramError for an unknown output. A
    row costs O(d h) for a first hidden width h.
    """

    def __init__(self, inputs: int, latent: int = 8, hidden: Sequence[int] = (128, 32), output: str = "linear") -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise unknown("output", output, OUTPUTS)
        down, up = (inputs, *hidden), (latent, *reversed(hidden))
        self.latent = latent
        self.encoder = _layers(down)
        self.mean = nn.Linear(down[-1], latent)
        self.logvar = nn.Linear(down[-1], latent)
        self.decoder = nn.Sequential(_layers(up), nn.Linear(up[-1], inputs), OUTPUTS[output]())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the code, both [B, z], of rows [B, d]."""
        hidden = self.encoder(x)
        return self.mean(hidden), self.logvar(hidden)

    def decode(self, code: Tensor) -> Tensor:
        """Rows [B, d] of codes [B, z]."""
        return self.decoder(code)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared error of every row, the sum over its d entries, and the divergence of its code from the standard
        normal, in nats; both [B].

        `noise` [B, z], standard normal, draws the code; without it the code is its mean.
        """
        mean, logvar = self.encode(x)
        code = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        error = (self.decode(code) - x).square().sum(1)
        return error, 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(1)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers between these widths, a ReLU after each."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(into, out), nn.ReLU()) for into, out in pairwise(widths)))
