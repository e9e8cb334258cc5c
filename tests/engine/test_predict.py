"""What a model says about rows: row by row, in their order, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import MISSING, Batch, Table
from engram.engine.predict import accuracy, evaluating, features, hits, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.models.output import Output
from engram.stats.seeds import generator


def rows(n: int = 11) -> Table:
    x = torch.randn(n, 6, generator=generator("rows"))
    return Table({"values": x}, x[:, :3].argmax(1))


def network(classes: tuple[int, ...] = (0, 1, 2)) -> Any:
    """A model in training mode with batch statistics of its own, dropout, and one part that is in eval mode."""
    spec = {"name": "MLP", "hidden": [8, 5], "norm": "batch", "dropout": 0.5}
    model = build(spec, inputs={"values": (6,)}, classes=classes, generator=generator("weights")).train()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(torch.linspace(-1, 1, len(value)))
    model.head.eval()
    return model


def directly(model: nn.Module, table: Table) -> Output:
    modes = {module: module.training for module in model.modules()}
    found: Output = model.eval()(**table.batch(torch.arange(len(table))).inputs)
    for module, mode in modes.items():
        module.training = mode
    return found


class Plain(nn.Module):
    """The logits of a row are its own values; counts the rows of each call, and notes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, values: Tensor) -> Output:
        self.calls.append((len(values), self.training, torch.is_grad_enabled()))
        return Output(logits=values)


@pytest.mark.parametrize("size", [1, 4, 11, 256])
@pytest.mark.parametrize("output", ["logits", "pooler_output"])
def test_every_row_in_order_however_they_are_cut(output: str, size: int) -> None:
    model = network()
    wanted = getattr(directly(model, rows()), output)
    found = predict(model, rows(), output, batch_size=size)
    assert torch.allclose(found, wanted, atol=1e-6) and not found.requires_grad


def test_chunks_are_of_the_batch_size_in_eval_mode_without_gradients() -> None:
    model = Plain().train()
    assert torch.equal(predict(model, rows(), batch_size=4), rows().inputs["values"])
    assert model.calls == [(4, False, False), (4, False, False), (3, False, False)]


@pytest.mark.parametrize("read", [predict, features], ids=["predict", "features"])
def test_modes_buffers_and_gradients_stay(read: Any) -> None:
    model = network()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read(model, rows())
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_modes_and_gradients_come_back_after_an_error() -> None:
    model = network()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model) as same:
        assert same is model and not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_the_loss_of_every_row() -> None:
    table = rows()
    assert table.labels is not None
    labels = table.labels.clone()
    labels[3] = MISSING
    found = predict(network(), table.with_labels(labels), "loss", batch_size=4)
    wanted = F.cross_entropy(directly(network(), table).logits, table.labels, reduction="none")
    wanted[3] = 0
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_function_of_output_and_batch() -> None:
    def label_logit(output: Output, batch: Batch) -> Tensor:
        assert output.logits is not None and batch.labels is not None
        return output.logits.gather(1, batch.labels[:, None])[:, 0] + 100 * batch.rows

    table = rows()
    assert table.labels is not None
    found = predict(network(), table, label_logit, batch_size=4)
    wanted = directly(network(), table).logits[torch.arange(11), table.labels] + 100 * torch.arange(11)
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_features_are_what_the_head_gets() -> None:
    model = network()
    found = features(model, rows(), batch_size=4)
    assert found.shape == (11, 5)
    assert torch.allclose(model.head(found), directly(model, rows()).logits, atol=1e-6)


def test_no_rows_give_an_empty_tensor_and_accuracy_nan() -> None:
    none = rows().take([])
    assert predict(network(), none).shape == (0, 3) and features(network(), none).shape == (0, 5)
    assert hits(network(), none).shape == (0,) and torch.tensor(accuracy(network(), none)).isnan()


@pytest.mark.parametrize("read", [predict, features, accuracy], ids=["predict", "features", "accuracy"])
def test_rows_are_counted(read: Any) -> None:
    run = Run()
    read(network(), rows(), run=run)
    read(network(), rows(7), run=run)
    assert run.cost.rows == 18


def test_the_run_says_where_the_model_goes_and_answers_are_on_the_cpu() -> None:
    def where(output: Any, batch: Batch) -> Tensor:
        seen.extend([output.logits.device.type, batch.inputs["values"].device.type])
        return torch.zeros(len(batch))

    seen: list[str] = []
    model = network()
    found = predict(model, rows(), where, run=Run(device="meta"))
    assert set(seen) == {"meta"} and {p.device.type for p in model.parameters()} == {"meta"}
    assert found.device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_the_same() -> None:
    found = predict(network(), rows(), run=Run(device="cuda"))
    assert found.device.type == "cpu" and torch.allclose(found, predict(network(), rows()), atol=1e-4)


@pytest.mark.parametrize(
    ("output", "table", "words"),
    [
        ("novelty", rows(), "output has no 'novelty'"),
        ("pooled", rows(), "output has no 'pooled'"),
        ("loss", rows().unlabelled(), "a loss needs labels"),
    ],
)
def test_what_is_not_there_is_named(output: str, table: Table, words: str) -> None:
    with pytest.raises(EngramError, match=words):
        predict(network(), table, output)


# --- accuracy

SCORES = Table(
    {"values": torch.tensor([[3.0, 1, 2], [1, 3, 2], [1, 2, 3], [2, 3, 1], [2, 1, 3]])},
    torch.tensor([0, 1, 2, 0, MISSING]),
)


@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        (None, [True, True, True, False, False]),  # a row without a label is never right
        ((0, 2), [True, False, True, True, False]),
        ((0, 2, 3, 7), [True, False, True, True, False]),  # a class without a column is never told
        ((7,), [False] * 5),
        ((), [False] * 5),
    ],
)
def test_hits_among_classes(classes: tuple[int, ...] | None, wanted: list[bool]) -> None:
    assert hits(Plain(), SCORES, classes=classes).tolist() == wanted
    assert accuracy(Plain(), SCORES, classes=classes) == pytest.approx(sum(wanted) / 5)


def test_a_retired_class_is_never_told_and_no_live_class_is_no_hit() -> None:
    model, table = network(), rows()
    model.head.retire([0])
    own = table.of_classes([0])
    assert len(own) and accuracy(model, own) == 0 and not (predict(model, table).argmax(1) == 0).any()
    model.head.retire([1, 2])
    assert not hits(model, table).any()
    assert not hits(model, table.with_labels(torch.full((11,), MISSING))).any()


def test_accuracy_needs_labels() -> None:
    with pytest.raises(EngramError, match="accuracy needs labels"):
        accuracy(network(), rows().unlabelled())
