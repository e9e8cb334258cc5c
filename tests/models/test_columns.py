from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.errors import EngramError
from engram.models import load, save
from engram.models.columns import Block, Columns
from engram.models.seeding import seeded

DRAWS = 7


def rows(n: int = 6) -> Tensor:
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(1))


def network(backward: bool = False) -> Columns:
    """Two blocks of two layers; the second listens to the first, and perhaps the other way round."""
    blocks = [
        {"hidden": [3, 2], "classes": [0, 4], "sources": [1] if backward else []},
        {"hidden": [5, 3], "classes": [2], "sources": [0]},
    ]
    with seeded(torch.Generator().manual_seed(DRAWS)):
        model = Columns(4, blocks)
        for p in model.parameters():
            torch.nn.init.uniform_(p, -1, 1)
    return model.eval()


def grown(model: Columns) -> Columns:
    """A third block beside it, which listens to both; and one more class in it."""
    twin = copy.deepcopy(model)
    with seeded(torch.Generator().manual_seed(8)):
        at = twin.put(Block(4, [4, 4]))
        twin.know(at, [1, 7])
        twin.link(0, at, like=0)
        twin.link(1, at)
    return twin


def test_what_it_says_by_hand() -> None:
    model, x = network(backward=True), rows()
    w = dict(model.named_parameters())

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    a, b = (F.relu(linear(f"blocks.{t}.layers.0", x)) for t in (0, 1))
    a2 = F.relu(linear("blocks.0.layers.1", a) + linear("blocks.0.links.1.0", b))
    b2 = F.relu(linear("blocks.1.layers.1", b) + linear("blocks.1.links.0.0", a))
    output = model(values=x)
    assert output.logits.shape == (6, 5) and bool(output.logits[:, [1, 3]].isneginf().all())
    wanted = torch.cat(
        [linear("blocks.0.heads.0", a2), linear("blocks.1.heads.2", b2), linear("blocks.0.heads.4", a2)], 1
    )
    assert torch.allclose(output.logits[:, [0, 2, 4]], wanted, atol=1e-6)
    assert torch.allclose(output.pooler_output, torch.cat([a2, b2], 1), atol=1e-6)


def test_what_is_added_leaves_the_bits_of_what_listens_to_nobody_else() -> None:
    model = network()
    before, after = model(values=rows()).logits, grown(model)(values=rows()).logits
    assert torch.equal(after[:, [0, 2, 4]], before[:, [0, 2, 4]])
    with seeded(torch.Generator().manual_seed(9)):
        model.know(0, [3])
        model.link(1, 0)  # a backward link starts at 0
    assert torch.equal(model(values=rows()).logits[:, [0, 2, 4]], before[:, [0, 2, 4]])


def test_classes_among_themselves_are_told_as_among_all() -> None:
    model = grown(network())
    whole = model(values=rows()).logits
    for among in ([0, 4], [2], [7, 1, 0]):
        part = model(values=rows(), among=among).logits
        assert torch.equal(part[:, among], whole[:, among])
        assert bool(part[:, [c for c in range(8) if c not in among]].isneginf().all())


def test_a_class_with_two_heads_is_told_by_the_surest() -> None:
    model = network()
    with seeded(torch.Generator().manual_seed(3)):
        model.know(1, [0])
    output = model(values=rows())
    tops = output.pooler_output.split([2, 3], 1)
    one, other = (block.heads["0"](top)[:, 0] for block, top in zip(model.columns, tops, strict=True))
    assert torch.equal(output.logits[:, 0], torch.maximum(one, other))
    assert bool((one > other).any()) or bool((other > one).any())


def test_wider_blocks_say_the_same_and_can_learn() -> None:
    model = network(backward=True)
    before = model(values=rows()).logits
    with seeded(torch.Generator().manual_seed(4)):
        model.widen(0, 3)
    assert model.columns[0].hidden == [6, 5]
    after = model(values=rows())
    assert torch.allclose(after.logits[:, [0, 2, 4]], before[:, [0, 2, 4]], atol=1e-6)
    after.logits[:, [0, 2, 4]].square().sum().backward()
    grown_weights = model.columns[0].heads["0"].weight.grad
    assert grown_weights is not None and bool((grown_weights[:, 2:] != 0).any())


def test_every_weight_is_in_one_group() -> None:
    model = grown(network(backward=True))
    found = [id(p) for group in model.groups() for p in model.weights(group)]
    assert len(found) == len(set(found)) and set(found) == {id(p) for p in model.parameters()}
    kinds = {(g.name, g.block, g.kind, g.layer, g.other) for g in model.groups()}
    assert ("blocks.1.links.0.0", 1, "link", 1, 0) in kinds and ("blocks.0.heads.4", 0, "head", 2, 4) in kinds


def test_a_link_begins_as_the_weights_within_a_block() -> None:
    model = grown(network())
    link = model.get_parameter("blocks.2.links.0.0.weight")
    assert torch.equal(link[:2], model.get_parameter("blocks.0.layers.1.weight")) and not bool(link[2:].any())
    assert not bool(model.get_parameter("blocks.2.links.1.0.weight").any())


def test_a_twin_has_the_features_and_no_class() -> None:
    model = network()
    at = model.put(model.twin(1))
    tops = model(values=rows()).pooler_output.split([2, 3, 3], 1)
    assert torch.equal(tops[1], tops[2]) and model.columns[at].classes == []
    assert model.columns[at].sources == [0]


def test_a_cleared_block_is_room() -> None:
    model = network()
    model.retire([0, 4])
    assert model.vacant == [0] and model.free_units == 5 and model.classes == [2]
    model.clear(0)
    assert model.listeners(0) == [] and not any(bool(p.any()) for p in model.columns[0].parameters())
    logits = model(values=rows()).logits
    assert logits.shape[1] == 5 and bool(logits[:, [0, 4]].isneginf().all())
    model.retire([2])
    assert bool(model(values=rows()).logits.isneginf().all())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = grown(network(backward=True))
    model.retire([7])
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert isinstance(again, Columns) and again.describe() == model.describe()
    assert torch.equal(again(values=rows()).logits, model(values=rows()).logits)


def test_labels_give_the_loss_and_images_are_rows() -> None:
    model, labels = network(), torch.tensor([0, 2, 4, 0, 2, 4])
    image = model(pixel_values=rows().view(6, 1, 2, 2), labels=labels)
    assert torch.equal(image.logits, model(values=rows()).logits)
    assert image.loss.item() == pytest.approx(F.cross_entropy(image.logits, labels).item())


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(EngramError, match="activation"):
        Columns(4, activation="relo")
    with pytest.raises(EngramError, match="reads 4 numbers"):
        network()(values=torch.zeros(2, 5))
