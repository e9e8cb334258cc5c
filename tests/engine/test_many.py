"""Many models at once are the models that would have been trained one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engram.engine.many as many
from engram.data.table import Table
from engram.engine.many import fit_many
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.heads import NearestMeanHead
from engram.stats.seeds import generator

N = 90


@pytest.fixture(scope="module")
def table() -> Table:
    draws = generator("rows of many")
    x = torch.randn(N, 1, 6, 6, generator=draws)
    y = (x[:, 0, 0, 0] > 0).long() + 2 * (x[:, 0, 1, 1] > 0).long()
    return Table({"pixel_values": x}, y)


def halves(k: int) -> list[Tensor]:
    return [torch.randperm(N, generator=generator("half", i))[: 40 + i] for i in range(k)]


def each_alone(recipe: Recipe, table: Table, subsets: list[Tensor]) -> list[nn.Module]:
    return [recipe(table.take(rows), seed) for seed, rows in enumerate(subsets)]


def distance(a: list[nn.Module], b: list[nn.Module]) -> float:
    pairs = [(p, q) for m, n in zip(a, b, strict=True) for p, q in zip(m.parameters(), n.parameters(), strict=True)]
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def recipe(network: Any = "MLP", classes: tuple[int, ...] = (0, 1, 2, 3), **optimizer: Any) -> Recipe:
    return Recipe(network, Optimizer(**optimizer), epochs=3, batch_size=16, classes=classes)


SMALL = {"name": "MLP", "hidden": [12]}
STACKED = {
    "adam": recipe(SMALL),
    "sgd with momentum, decay and clipping": recipe(SMALL, name="sgd", lr=0.1, weight_decay=1e-3, clip=0.2),
    "adamw with warmup and cosine": recipe(SMALL, name="adamw", schedule="cosine", warmup=0.3, lr=0.01),
    "convolutions": recipe({"name": "ConvNet", "widths": [4, 8], "norm": "group"}, lr=0.01),
    "attention": recipe({"name": "ViT", "patch_size": 3, "width": 8, "depth": 1, "heads": 2}, name="sgd", lr=0.1),
    "classes of its rows": recipe(SMALL, classes=()),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_models_are_those_trained_alone(name: str, table: Table) -> None:
    subsets, run = halves(5), Run()
    found = fit_many(STACKED[name], table, subsets, range(5), run, how="stacked", workers=1)
    alone = each_alone(STACKED[name], table, subsets)
    assert distance(found, alone) < 1e-5
    assert distance(found[:4], alone[1:]) > 1e-3
    assert not any(module.training for module in found)


def test_models_of_numbers_are_stacked_too(table: Table) -> None:
    numbers = table.with_labels(torch.randn(N, 2, generator=generator("targets")))
    subsets, plan = halves(3), recipe(SMALL, classes=())
    found = fit_many(plan, numbers, subsets, range(3), how="stacked")
    assert distance(found, each_alone(plan, numbers, subsets)) < 1e-5


def test_subsets_may_be_masks_and_hold_other_classes(table: Table) -> None:
    assert table.labels is not None
    masks = torch.stack([table.labels != k for k in range(4)])
    plan = recipe(SMALL, classes=())
    found = fit_many(plan, table, masks, range(4), how="stacked")
    assert distance(found, each_alone(plan, table, [mask.nonzero()[:, 0] for mask in masks])) < 1e-5


def test_a_pool_gives_the_same_bits(table: Table) -> None:
    subsets, plan = halves(3), recipe(SMALL)
    run = Run()
    found = fit_many(plan, table, subsets, range(3), run, how="alone", workers=2)
    assert distance(found, each_alone(plan, table, subsets)) == 0
    assert run.cost.rows == 3 * (40 + 41 + 42) and run.cost.steps == 3 * 9
    stacked = fit_many(plan, table, subsets, range(3), how="stacked", workers=2)
    assert distance(stacked, found) < 1e-5


@pytest.mark.parametrize(
    ("network", "largest"),
    [
        (SMALL, 5),
        ({"name": "MLP", "hidden": [600, 600]}, 1),
        ({"name": "MLP", "hidden": [12], "dropout": 0.1}, 1),
        ({"name": "ConvNet", "widths": [4]}, 1),
        ({"name": "ConvNet", "widths": [4], "norm": None}, 5),
    ],
)
def test_the_choice_follows_from_the_shape_and_is_journaled(
    network: Any, largest: int, table: Table, tmp_path: Path
) -> None:
    said: list[str] = []
    run = Run(tmp_path)
    run.report.say = said.append  # type: ignore[method-assign]
    plan = Recipe(network, epochs=1, classes=(0, 1, 2, 3))
    fit_many(plan, table, halves(5), range(5), run)
    jobs, workers = run.journal.load(("many", "plan"))[0]  # type: ignore[index]
    assert workers == 1 and max(len(which) for which, _ in jobs) == largest
    assert all(stacked == (largest > 1) for _, stacked in jobs)
    assert sorted(k for which, _ in jobs for k in which) == list(range(5))
    assert ("5 in stacks, 0 each by itself, in this process" in said[0]) == (largest > 1)


def test_it_goes_on_after_the_last_finished_round(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, subsets = recipe(SMALL), halves(5)
    monkeypatch.setattr(many, "STACK", 2)
    whole = fit_many(plan, table, subsets, range(5), how="stacked")
    original, rounds = many._round, []

    def killed(*args: Any) -> list[nn.Module]:
        rounds.append(args)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(many, "_round", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_many(plan, table, subsets, range(5), Run(tmp_path), how="stacked")
    resumed = fit_many(plan, table, subsets, range(5), Run(tmp_path), how="stacked")
    assert distance(resumed, whole) == 0
    assert len(rounds) == 2 + 2  # three rounds of stacks of two: the first was there


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"how": "piled"}, "piled"),
        ({"subsets": torch.ones(2, N - 1, dtype=torch.bool)}, "the table has 90"),
        ({"seeds": [1]}, "1 seeds"),
        ({"subsets": [torch.tensor([1]), torch.zeros(N, dtype=torch.bool)]}, "empty"),
        ({"recipe": recipe({"name": "ConvNet", "widths": [4]})}, "statistics of its batches"),
        ({"recipe": recipe({"name": "MLP", "hidden": [4], "dropout": 0.5})}, "what to drop"),
        ({"recipe": recipe(NearestMeanHead(1))}, "NearestMeanHead"),
        ({"recipe": lambda table, seed, run=None: NearestMeanHead(1)}, "Recipe"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], sentence: str, table: Table) -> None:
    given: dict[str, Any] = {"recipe": recipe(SMALL), "subsets": halves(2), "seeds": [0, 1], "how": "stacked"}
    given |= change
    with pytest.raises(EngramError, match=sentence):
        fit_many(given["recipe"], table, given["subsets"], given["seeds"], how=given["how"])


def test_no_models_are_no_work(table: Table) -> None:
    assert fit_many(recipe(SMALL), table, [], []) == []


def test_any_trainer_is_run_each_by_itself(table: Table) -> None:
    def trainer(rows: Table, seed: int, run: Run | None = None) -> nn.Module:
        model = NearestMeanHead(1)
        model.set([0], torch.tensor([[float(len(rows) + seed)]]))
        return model

    found = fit_many(trainer, table, halves(2), [0, 1])
    assert [float(m.means) for m in found] == [40.0, 42.0]
