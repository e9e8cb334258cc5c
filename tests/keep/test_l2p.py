from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import NEW, halves, learnt, same, weights

from engram.core.learner import fork
from engram.data.table import Table
from engram.engine.predict import predict
from engram.errors import EngramError
from engram.keep.l2p import L2P
from engram.models import digest


def test_the_loss_written_down(tiny: Table) -> None:
    learner = learnt(L2P.tiny(), tiny)
    learner.pull = 0.7
    batch = tiny.of_classes(NEW).batch(torch.arange(10))
    with torch.no_grad():
        query = learner.model.encoder.inner(**batch.inputs).pooler_output
        z = learner.model(**batch.inputs).logits.double()
    total = 0.0
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        total -= float(z[row, 5:].log_softmax(0)[label - 5])
        alike = F.cosine_similarity(query[row : row + 1], learner.model.encoder.keys.detach())
        total += 0.7 * float((1 - alike.sort(descending=True).values[:2]).sum())
    assert learner.step(batch, halves(tiny)[1]).value.item() == pytest.approx(total / 10, rel=1e-4)


def test_the_pull_moves_chosen_keys_alone_and_nearer(tiny: Table) -> None:
    learner = learnt(L2P.tiny(), tiny)
    batch = tiny.batch(torch.arange(3))
    encoder = learner.model.encoder
    query = F.normalize(encoder.inner(**batch.inputs).pooler_output, dim=1)
    chosen = set((query @ F.normalize(encoder.keys, dim=1).T).topk(2, 1).indices.flatten().tolist())
    before = encoder(**batch.inputs).extra["likeness"].sum()
    (grad,) = torch.autograd.grad(-before, encoder.keys)
    assert {k for k in range(4) if float(grad[k].abs().sum()) > 0} == chosen
    with torch.no_grad():
        encoder.keys.sub_(0.01 * grad)
    assert encoder(**batch.inputs).extra["likeness"].sum() > before


def test_two_forward_passes_of_the_encoder_for_a_row(tiny: Table) -> None:
    learner = learnt(L2P.tiny(), tiny)
    seen: list[int] = []
    learner.model.encoder.inner.register_forward_hook(lambda _, args, out: seen.append(len(out.pooler_output)))
    predict(learner.model, tiny, batch_size=7)
    assert sum(seen) == 2 * len(tiny)


def test_pool_keys_and_head_learn_and_the_encoder_stays(tiny: Table) -> None:
    learner = L2P.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    before, frozen = weights(learner), digest(learner.model.encoder.inner)
    learner.learn(second)
    moved = {name for name, p in weights(learner).items() if p.shape != before[name].shape or not p.equal(before[name])}
    wanted = {"encoder.keys", "encoder.prompts.0", "encoder.prompts.1", "head.weight", "head.bias"}
    assert moved == wanted and digest(learner.model.encoder.inner) == frozen


def test_prompts_that_no_row_takes_keep_their_bits(tiny: Table) -> None:
    learner = L2P(network=L2P.tiny().network, lengths=(2,), pool=12, top=1, pull=0.0, epochs=2)
    first, second = halves(tiny)
    learner.learn(first)
    before = learner.model.encoder.prompts["0"].detach().clone()
    query = F.normalize(predict(learner.model.encoder.inner, second.train, "pooler_output"), dim=1)
    keys = F.normalize(learner.model.encoder.keys.detach(), dim=1)
    taken = set((query @ keys.T).argmax(1).tolist())
    learner.learn(second)
    after = learner.model.encoder.prompts["0"].detach()
    assert 0 < len(taken) < 12
    assert {k for k in range(12) if not after[k].equal(before[k])} == taken


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = L2P.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)


def test_bad_input_is_said(tiny: Table) -> None:
    with pytest.raises(EngramError, match="takes 1 to 3 prompts of a pool of 3, not 4"):
        L2P(network=L2P.tiny().network, lengths=(2,), pool=3, top=4).learn(halves(tiny)[0])
