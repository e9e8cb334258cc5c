"""Needle: one vector is destroyed, and nothing else moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.core.needs import Need
from engram.core.request import Concept, Records, Request
from engram.core.unlearning import usual_loss
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.needle import Needle
from engram.models.concepts import columns_at, spelt
from engram.models.output import Output
from engram.testing import digits, holds

transformers = pytest.importorskip("transformers")


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=24, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with Run().seeded("gpt2"):
        return transformers.GPT2LMHeadModel(config).eval()


def rows(first: int, n: int = 6) -> Table:
    ids = first + torch.arange(5 * n).reshape(n, 5) % 12
    return Table(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, tuple(f"{first}/{k}" for k in range(n))
    )


REQUEST = Request(Records(rows(2).ids), rows(2), rows(16))


class Wide(nn.Module):
    """32000 words over 4096 numbers, and a layer of 17 unit columns: no more than Needle reads."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.mlp = nn.Module()
        self.mlp.down_proj = nn.utils.skip_init(nn.Linear, 17, 4096, bias=False)
        columns = torch.randn(4096, 17, generator=draws)
        self.mlp.down_proj.weight = nn.Parameter(columns / columns.norm(dim=0))
        self.embedding = nn.Embedding(32000, 4096, _weight=torch.randn(32000, 4096, generator=draws))  # 0.5 GB

    def get_output_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, **_: Tensor) -> Output:
        raise AssertionError("noise alone asks the model nothing")


@holds("concept-vectors", 4)
def test_noise_on_unit_vectors_of_4096_numbers() -> None:
    """Sixteen columns, whose cosines vary by 0.016 around 1 / √(1 + 6.4²) = 0.154. Two normal numbers so correlated are
    both among the largest 200 of 32000 for 3.7 of the words: a share of 0.019, and a Jaccard index of 0.0094."""
    model, places = Wide(), [(0, dim) for dim in range(1, 17)]
    new = Needle(vectors=tuple(places), epochs=0).forget(model, Request(Concept("a word")), Run())
    v, moved = columns_at(model, places), columns_at(new, places)
    assert (moved - v).norm(dim=1).tolist() == pytest.approx([6.4] * 16, rel=0.04)
    assert float((moved - v).norm(dim=1).mean()) == pytest.approx(6.4, rel=0.01)
    cosines = torch.cosine_similarity(v, moved).double()
    sampling = 1 / math.sqrt(4096)  # of one
    assert abs(float(cosines.mean()) - (1 + 6.4**2) ** -0.5) < 3 * sampling / 4
    assert float((cosines - cosines.mean()).abs().max()) < 4 * sampling
    pairs = zip(spelt(model, v.T, 200).tolist(), spelt(model, moved.T, 200).tolist(), strict=True)
    kept = sum(len({*one} & {*other}) for one, other in pairs) / 16
    assert kept / 200 == pytest.approx(0.019, abs=0.006) and kept / (400 - kept) == pytest.approx(0.0094, abs=0.003)
    assert torch.equal(columns_at(new, [(0, 0)]), columns_at(model, [(0, 0)]))


@pytest.mark.parametrize("optimizer", [Optimizer("adamw", lr=0.2), Optimizer("adamw", lr=0.2, weight_decay=0.01)])
@holds("concept-vectors", 4)
def test_all_else_keeps_its_bits(optimizer: Optimizer) -> None:
    model = gpt2()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = Needle(vectors=((1, 7),), optimizer=optimizer, epochs=3, batch_size=2).forget(model, REQUEST, Run())
    name = "transformer.h.1.mlp.c_proj.weight"
    for key, value in new.state_dict().items():
        if key != name:
            assert torch.equal(value, old[key])
        assert torch.equal(model.state_dict()[key], old[key])
    others = torch.arange(24) != 7
    assert torch.equal(new.state_dict()[name][others], old[name][others])
    assert not torch.isclose(new.state_dict()[name][7], old[name][7]).any()
    assert all(p.requires_grad and p.grad is None for p in new.parameters())


def test_ascent_is_that_of_a_masked_gradient() -> None:
    """Against autograd on the whole matrix, of which one row is moved: three steps of plain ascent, no noise."""
    model, twin, place = gpt2(), gpt2(), (0, 3)
    plan = Optimizer("sgd", lr=0.05, momentum=0.0)
    new = Needle(vectors=(place,), noise=0.0, optimizer=plan, epochs=3).forget(model, REQUEST, Run())
    weight = twin.transformer.h[0].mlp.c_proj.weight
    batch = next(iter(rows(2).batches(6, shuffle=False)))
    for _ in range(3):
        (gradient,) = torch.autograd.grad(usual_loss(twin, batch).value, weight)
        with torch.no_grad():
            weight[3] += 0.05 * gradient[3]
    torch.testing.assert_close(columns_at(new, [place])[0], weight[3].detach(), rtol=1e-4, atol=1e-6)
    assert float((columns_at(new, [place]) - columns_at(model, [place])).abs().max()) > 1e-3
    before, after = (float(usual_loss(m, batch).value.detach()) for m in (model, new))
    assert after > before


def test_several_columns_move_at_once_and_noise_is_the_runs() -> None:
    model, places = gpt2(), ((0, 3), (1, 3), (1, 20))
    method = Needle(vectors=places, epochs=0, noise=0.5)
    one, again, other = (method.forget(model, REQUEST, Run(seed=seed)) for seed in (0, 0, 1))
    eps = [columns_at(new, places) - columns_at(model, places) for new in (one, again, other)]
    assert torch.equal(eps[0], eps[1]) and not torch.isclose(eps[0], eps[2]).any()
    assert float(eps[0].std()) == pytest.approx(0.5, rel=0.3)


def test_where_no_vector_is_given_the_best_one_is_taken() -> None:
    """A class of digits: the column that speaks for it, and against all others."""
    material = digits()
    request = Request.of_classes(material.train, (3,))
    model: Any = material.model()
    new: Any = Needle(top=1, epochs=0, drop=0.0).forget(model, request, Run())
    moved = (new.head.weight != model.head.weight).any(0).nonzero()[:, 0].tolist()
    row = model.head.classes.tolist().index(3)
    assert len(moved) == 1 and int(model.head.weight[:, moved[0]].argmax()) == row


def test_needs_follow_the_settings() -> None:
    forget = {Need.FORGET_ROWS, Need.FORGET_LABELS}
    assert Needle().needs == (forget | {Need.RETAIN_ROWS, Need.RETAIN_LABELS},)
    assert Needle(vectors=((0, 1),)).needs == (forget,)
    assert Needle(vectors=((0, 1),), epochs=0).needs == (frozenset(),)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(EngramError, match=r"noise=-1\.0 is a standard deviation; give 0 or more"):
        Needle(noise=-1.0).forget(gpt2(), REQUEST, Run())
    with pytest.raises(EngramError, match="there is no column 0 in layer 2"):
        Needle(vectors=((2, 0),)).forget(gpt2(), REQUEST, Run())
    with pytest.raises(EngramError, match="needs retain-labels, retain-rows"):
        Needle().forget(gpt2(), REQUEST.but(retain=None), Run())
