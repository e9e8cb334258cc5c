"""The interfaces carry the erasure of a concept from a text-to-image module.

A fixture, no more: a denoiser of 4 x 4 blobs conditioned on one learnt embedding per word, erased with the loss of ESD
(arXiv 2303.07345): the prediction for the word moves to e_0 - eta (e_p - e_0), both of the frozen model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.core.forgetter import Forgetter
from engram.core.needs import Need, Needs, needs
from engram.core.request import Concept, Request
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import frozen
from engram.models.seeding import seeded
from engram.stats.seeds import generator

WORDS = ("", "left", "right", "top", "bottom")


class Blobs(nn.Module):
    """eps(z [B, 16], t [B], word) -> [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 8)
        self.layers = nn.Sequential(nn.Linear(16 + 8 + 1, 64), nn.SiLU(), nn.Linear(64, 16))

    def eps(self, z: Tensor, t: Tensor, word: str) -> Tensor:
        state = self.words(torch.full((len(z),), WORDS.index(word)))
        return self.layers(torch.cat([z, state, t[:, None]], 1))


def noisy(word: str, draws: torch.Generator, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Noised images of a word [n, 16], their level [n], and the noise."""
    image = torch.zeros(4, 4)
    image[{"left": (slice(None), 0), "right": (slice(None), 3), "top": 0, "bottom": 3}[word]] = 1.0
    t, noise = torch.rand(n, generator=draws), torch.randn(n, 16, generator=draws)
    level = (1 - t)[:, None]
    return level.sqrt() * image.flatten() + (1 - level).sqrt() * noise, t, noise


@dataclass(kw_only=True, eq=False)
class Erase(Forgetter):
    """Move one word's prediction away from it; only the denoiser's layers are trained."""

    eta: float = 1.0
    keep: tuple[str, ...] = ()  # words whose predictions are held
    steps: int = 150
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3))

    @property
    def needs(self) -> Needs:
        return needs({Need.CONCEPT})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        assert isinstance(model, Blobs) and isinstance(request.what, Concept)
        word, new = request.what.text, copy.deepcopy(model)
        teacher: Any = frozen(model)
        new.words.requires_grad_(False)

        def step(batch: tuple[Tensor, Tensor, Tensor]) -> Mean:
            z, t, _ = batch
            loss = Mean.of((new.eps(z, t, word) - self.target(teacher, z, t, word)).square())
            for other in self.keep:
                loss = loss + Mean.of((new.eps(z, t, other) - teacher.eps(z, t, other)).square())
            return loss

        run = run or Run()

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            yield from (noisy(word, run.generator("images", k)) for k in range(self.steps))

        fit(step, batches, model=new, optimizer=self.optimizer, epochs=1, run=run)
        return new.eval()

    def target(self, teacher: nn.Module, z: Tensor, t: Tensor, word: str) -> Tensor:
        assert isinstance(teacher, Blobs)
        with torch.no_grad():
            plain, prompted = teacher.eps(z, t, ""), teacher.eps(z, t, word)
        return plain - self.eta * (prompted - plain)


@pytest.fixture(scope="module")
def model() -> Blobs:
    with seeded(torch.Generator().manual_seed(0)):
        net = Blobs()

    def step(k: int) -> Mean:
        word = WORDS[1 + k % 4]
        z, t, noise = noisy(word, generator("training", k))
        said = word if k % 10 else ""
        return Mean.of((net.eps(z, t, said) - noise).square())

    fit(step, lambda e: range(800), model=net, optimizer=Optimizer(lr=3e-3), epochs=1, run=Run())
    return net.eval()


def test_identities_of_the_loss(model: Blobs) -> None:
    z, t, _ = noisy("left", generator("check"))
    plain, prompted = model.eps(z, t, ""), model.eps(z, t, "left")
    for eta in (1.0, 2.0):
        target = Erase(eta=eta).target(model, z, t, "left")
        gap = (prompted - target).square().mean()
        torch.testing.assert_close(gap, (1 + eta) ** 2 * (prompted - plain).square().mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(target, prompted - (1 + eta) * (prompted - plain), rtol=0, atol=1e-5)


def test_the_word_moves_and_the_others_stay_nearer(model: Blobs) -> None:
    new = Erase(keep=("", "right", "top", "bottom")).forget(model, Request(Concept("left")))
    assert isinstance(new, Blobs)
    assert torch.equal(new.words.weight, model.words.weight)

    @torch.no_grad()
    def error(net: Blobs, word: str) -> float:
        z, t, noise = noisy(word, generator("held out"), 512)
        return float((net.eps(z, t, word) - noise).square().mean())

    worse = {word: error(new, word) / error(model, word) for word in WORDS[1:]}
    assert worse["left"] > 1.5
    assert max(worse[word] for word in ("right", "top", "bottom")) < 1.15
