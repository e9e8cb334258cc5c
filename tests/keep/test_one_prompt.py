from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.keep.halves import NEW, OLD, halves, learnt, same, weights
from torch import nn

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.persist import load_learner, save_learner
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.gradient_difference import GradientDifference
from engram.keep.one_prompt import OnePrompt
from engram.models import digest, load
from engram.testing import holds


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@holds("ovor", 1)
def test_one_forward_pass_of_the_encoder_for_a_row(tiny: Table) -> None:
    learner = learnt(OnePrompt.tiny(), tiny)
    seen: list[int] = []
    learner.model.encoder.inner.register_forward_hook(lambda _, args, out: seen.append(len(out.pooler_output)))
    predict(learner.model, tiny, batch_size=7)
    assert sum(seen) == len(tiny)


def test_prompt_and_head_learn_and_the_encoder_stays(tiny: Table) -> None:
    learner = OnePrompt.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    before, frozen = weights(learner), digest(learner.model.encoder.inner)
    learner.learn(second)
    assert trained(learner.model) == {"encoder.prompts.0", "encoder.prompts.1", "head.weight", "head.bias"}
    assert digest(learner.model.encoder.inner) == frozen
    assert not torch.equal(weights(learner)["encoder.prompts.0"], before["encoder.prompts.0"])


def test_columns_of_earlier_tasks_keep_their_bits(tiny: Table) -> None:
    learner = OnePrompt.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    before = weights(learner)
    learner.learn(second)
    after = weights(learner)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(after[name][: len(OLD)], before[name])
        assert after[name][len(OLD) :].abs().sum() > 0


def test_the_loss_written_down(tiny: Table) -> None:
    learner = learnt(OnePrompt.tiny(), tiny)
    rows = tiny.of_classes(NEW)
    batch = rows.batch(torch.arange(12))
    output = learner.model(**batch.inputs)
    z, total = output.logits.detach().double(), 0.0
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        others = sum(float(z[row, c].exp()) for c in NEW)
        total -= float(z[row, label]) - torch.tensor(others).log().item()
    assert learner.columns == NEW
    assert learner.terms(batch, output).value.item() == pytest.approx(total / 12, rel=1e-5)


def test_it_is_told_by_the_largest_of_all_logits(tiny: Table) -> None:
    logits = predict(learnt(OnePrompt.tiny(), tiny).model, tiny)
    assert logits.shape == (60, 10) and bool(logits.isfinite().all())
    assert set(logits.argmax(1).tolist()) & set(OLD) and set(logits.argmax(1).tolist()) & set(NEW)


def test_prompts_learn_what_a_head_alone_does_not(tiny: Table) -> None:
    body = {"name": "ViT", "patch_size": 4, "width": 8, "depth": 2, "heads": 2}
    settings: dict[str, Any] = {"network": body, "epochs": 30, "batch_size": 30, "optimizer": Optimizer(lr=3e-2)}
    task = Task(tiny, classes=tuple(range(10)))
    losses = []
    for lengths in ((8, 8), ()):
        learner = OnePrompt(**settings, lengths=lengths)
        learner.learn(task)
        losses.append(float(predict(learner.model, tiny, "loss").mean()))
    assert losses[0] < losses[1] - 0.05


def test_without_prompts_any_encoder_does(tiny: Table) -> None:
    learner = OnePrompt(network="Identity", lengths=(), epochs=20, optimizer=Optimizer(lr=1e-2))
    learner.learn(halves(tiny)[0])
    assert trained(learner.model) == {"head.weight", "head.bias"}
    assert accuracy(learner.model, tiny.of_classes(OLD)) > 0.9


def test_on_a_transformers_vit_from_a_directory(tiny: Table, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from engram.models import save, seeded

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    with seeded(torch.Generator().manual_seed(0)):
        save(ViTForImageClassification(config).eval(), tmp_path / "vit")
    learner = learnt(OnePrompt(network=str(tmp_path / "vit"), lengths=(2, 4), epochs=1), tiny)
    save_learner(learner, tmp_path / "learner", tasks=2)
    again = load_learner(tmp_path / "learner")[0]
    wanted = predict(learner.model, tiny)
    assert torch.equal(predict(again.model, tiny), wanted)
    assert torch.equal(predict(load(tmp_path / "learner" / "model"), tiny), wanted)


def test_a_forgetter_works_on_the_whole_predictor(tiny: Table) -> None:
    learner = learnt(OnePrompt.tiny(), tiny)
    frozen, request = digest(learner.model.encoder.inner), Request.of_classes(tiny, (3,))
    done = forget(learner, request, GradientDifference(epochs=1, optimizer=Optimizer(lr=1e-2)))
    assert set(done.residue) == set(tiny.of_classes((3,)).ids)
    assert digest(learner.model.encoder.inner) == frozen
    assert learner.holds(request.ids) == ()


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = OnePrompt.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and trained(twin.model) == trained(learner.model)


def test_seeds_differ_in_prompts(tiny: Table) -> None:
    one, other = (learnt(OnePrompt.tiny(), tiny, Run(seed=seed)) for seed in (0, 1))
    assert not torch.equal(weights(one)["encoder.prompts.0"], weights(other)["encoder.prompts.0"])


def test_bad_input_is_said(tiny: Table) -> None:
    numbers = Table(tiny.inputs, torch.rand(len(tiny), 1, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(EngramError, match="class labels, and the target of these rows is numbers"):
        OnePrompt.tiny().learn(Task(numbers))
    with pytest.raises(EngramError, match="no attention that takes prefixes"):
        OnePrompt(network="MLP").learn(halves(tiny)[0])
    with pytest.raises(EngramError, match="no layer 6 to put a prompt into; the network has 6"):
        OnePrompt(network={"name": "ViT", "width": 8}, lengths=(0, 0, 0, 0, 0, 0, 2)).learn(halves(tiny)[0])
