"""Bayes error noise: the estimator and its gradient, the ascent on two moons, the bound as stored, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engram.cli import main
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.ascend import ascend, ball
from engram.engine.fit import _Loop
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.protect import bayes_error_noise
from engram.protect.bayes_error_noise import BayesErrorNoise, bayes_error, mixed, stored
from engram.reproduce.provably_unlearnable_examples import BELOW, moons, taught
from engram.testing import digits, holds

SMALL = Recipe({"name": "MLP", "hidden": [16]}, Optimizer(lr=1e-2), epochs=3, batch_size=64)


def plain(z: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """The definition, by loops, without its gradient's closed form."""
    errors = []
    for i in range(len(z)):
        s = torch.exp(-(z - z[i]).square().sum(1) / (2 * sigma**2))
        s = torch.cat([s[:i], s.new_zeros(1), s[i + 1 :]])
        p = torch.stack([s[labels == c].sum() for c in torch.unique(labels)]) / s.sum()
        errors.append(1 - p.max())
    return torch.stack(errors).mean()


def gradient(z: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    point = z.clone().requires_grad_()
    return torch.autograd.grad(error(point), point)[0]


# --- the estimator


@holds("provably-unlearnable-examples", 1)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_gradient_is_that_of_the_definition_and_of_finite_differences(chunk: int) -> None:
    z, labels = moons(200, 0)
    wanted = gradient(z, lambda x: plain(x, labels, 0.3))
    found = gradient(z, lambda x: bayes_error(x, labels, 0.3, chunk=chunk))
    torch.testing.assert_close(bayes_error(z, labels, 0.3, chunk=chunk), plain(z, labels, 0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    for place in [(0, 0), (17, 1), (150, 0), (199, 1)]:
        step = torch.zeros_like(z)
        step[place] = 1e-5
        ahead, behind = (plain(z + sign * step, labels, 0.3) for sign in (1, -1))
        assert float(found[place]) == pytest.approx(float(ahead - behind) / 2e-5, abs=1e-8)
    assert float(found.abs().max()) > 1e-4


@pytest.mark.parametrize("classes", [2, 5])
def test_the_gradient_with_more_classes_and_dimensions(classes: int) -> None:
    draws = torch.Generator().manual_seed(classes)
    z, labels = torch.randn(60, 8, generator=draws).double(), torch.randint(classes, (60,), generator=draws) * 3 + 4
    wanted = gradient(z, lambda x: plain(x, labels, 1.1))
    found = gradient(z, lambda x: bayes_error(x, labels, 1.1, chunk=17))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    doubled = gradient(z, lambda x: 2 * bayes_error(x, labels, 1.1))
    torch.testing.assert_close(doubled, 2 * found, rtol=1e-12, atol=1e-15)


@holds("provably-unlearnable-examples", 2)
def test_worked_numbers() -> None:
    balanced = torch.arange(200) % 2
    assert float(bayes_error(torch.ones(200, 3), balanced)) == pytest.approx(99 / 199, abs=1e-12)
    apart = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double() * 0.1
    apart[balanced == 1] += 10
    assert float(bayes_error(apart, balanced)) < 1e-6


@holds("provably-unlearnable-examples", 2)
@given(st.integers(0, 999), st.integers(2, 6), st.floats(0.05, 5))
def test_it_lies_between_0_and_1_minus_1_over_the_classes(seed: int, classes: int, sigma: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (30,), generator=draws)])
    error = float(bayes_error(torch.randn(len(labels), 3, generator=draws).double(), labels, sigma))
    assert -1e-12 <= error <= 1 - 1 / classes + 1e-12


@holds("provably-unlearnable-examples", 3)
def test_a_wide_kernel_leaves_what_the_largest_class_does_not_hold() -> None:
    z = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = (torch.arange(1000) >= 700).long()
    assert float(bayes_error(z, labels, 1e4)) == pytest.approx(1 - 0.7, abs=1e-3)
    left_out = (700 * (1 - 699 / 999) + 300 * (1 - 700 / 999)) / 1000  # the same, with each point itself left out
    assert float(bayes_error(z, labels, 1e6)) == pytest.approx(left_out, abs=1e-9)


@holds("provably-unlearnable-examples", 3)
@given(st.integers(0, 999), st.floats(-1e3, 1e3))
def test_moving_turning_and_reordering_the_points_changes_nothing(seed: int, shift: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    z, labels = torch.randn(40, 3, generator=draws).double(), torch.randint(3, (40,), generator=draws)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draws).double()).Q
    order = torch.randperm(40, generator=draws)
    error = bayes_error(z, labels, 0.5)
    torch.testing.assert_close(bayes_error((z @ turn + shift)[order], labels[order], 0.5), error, rtol=0, atol=1e-8)


def test_points_far_from_all_others_follow_their_nearest_one() -> None:
    """Their similarities are all 0 in floating point, which is no error by itself."""
    z = torch.tensor([[0.0], [0.1], [50.0], [50.1], [900.0]], dtype=torch.float64)
    assert float(bayes_error(z, torch.tensor([0, 0, 1, 1, 1]), 0.3)) < 1e-6
    assert bool(gradient(z, lambda x: bayes_error(x, torch.tensor([0, 1, 0, 1, 1]))).isfinite().all())


@pytest.mark.parametrize(("n", "sigma"), [(1, 0.3), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_what_has_no_bayes_error(n: int, sigma: float) -> None:
    with pytest.raises(EngramError, match="sigma > 0"):
        bayes_error(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), sigma)


# --- the ascent


@holds("provably-unlearnable-examples", 4)
def test_on_two_moons_the_error_rises_at_every_step_far_above_random_noise() -> None:
    z, labels = moons(600, 0)
    errors: list[float] = []

    def objective(x: Tensor) -> Tensor:
        error = bayes_error(x, labels, 0.3)
        errors.append(float(error.detach()))
        return error

    moved = ascend(z, objective, project=ball(0.3), steps=200, optimizer=Optimizer(lr=0.01))
    errors.append(float(bayes_error(moved, labels, 0.3)))
    signs = torch.randint(0, 2, z.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    random = float(bayes_error(z + 0.3 * signs, labels, 0.3))
    assert float((moved - z).abs().max()) <= 0.3 + 1e-12
    assert all(later > earlier for earlier, later in pairwise(errors))
    assert errors[0] < 0.1 and errors[-1] > 0.25 and errors[-1] > 1.5 * random


# --- the bound


def images(kind: torch.dtype) -> Table:
    table = digits().train
    pixels = table.inputs["pixel_values"]
    return replace(table, inputs={"pixel_values": pixels if kind.is_floating_point else (pixels * 255).to(kind)})


@holds("provably-unlearnable-examples", 5)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("eps", [8 / 255, 0.1, 0.0999, 0.5])
def test_the_change_as_stored_is_within_the_budget_and_the_range(kind: torch.dtype, eps: float) -> None:
    table = images(kind)
    found = replace(BayesErrorNoise.tiny(), eps=eps, optimizer=Optimizer(lr=0.5)).protect(table)
    whole = 255 if kind == torch.uint8 else 1
    before, after = (one.inputs["pixel_values"].double() / whole for one in (table, found))
    reached = float((after - before).abs().max())
    assert 0.98 * eps - 1 / 255 < reached <= eps + 1e-12
    assert after.min() >= 0 and after.max() <= 1
    assert found.inputs["pixel_values"].dtype == kind and found.ids == table.ids


@holds("provably-unlearnable-examples", 5)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_without_a_budget_the_images_stay_to_the_bit(kind: torch.dtype) -> None:
    table = images(kind)
    found = replace(BayesErrorNoise.tiny(), eps=0.0).protect(table)
    assert torch.equal(found.inputs["pixel_values"], table.inputs["pixel_values"])


@given(st.integers(0, 999), st.floats(0, 1))
def test_rounding_does_not_break_the_bound(seed: int, eps: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    for pixels in (torch.randint(256, (200,), generator=draws).to(torch.uint8), torch.rand(200, generator=draws)):
        whole = 255 if pixels.dtype == torch.uint8 else 1
        start = pixels.double() / whole
        moved = ball(eps, 0.0, 1.0)(2 * torch.rand(200, generator=draws).double() - 0.5, start)
        found = stored(moved, pixels, eps).double() / whole
        assert float((found - start).abs().max()) <= eps + 1e-8
        assert float((found - moved).abs().max()) <= (1 / 255 if whole > 1 else 1.2e-7)


# --- the protector


def test_the_gradient_through_the_network_is_that_of_all_images_at_once() -> None:
    table = digits().train
    labels = table.labels
    assert labels is not None
    climb = bayes_error_noise._Climb(replace(BayesErrorNoise.tiny(), recipe=SMALL, chunk=13), table, Run())
    x = table.inputs["pixel_values"]
    climb.renew(x, 0)

    def whole(pixels: Tensor) -> Tensor:
        z = climb.features(pixel_values=pixels)
        return plain(z / z.detach().abs().max(), labels, 0.3)

    found = gradient(x, climb.error)
    assert float(found.abs().max()) > 1e-5
    torch.testing.assert_close(found, gradient(x, whole), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_the_error_rises_in_features_of_fresh_networks(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method = BayesErrorNoise(eps=0.2, steps=20, refresh=5, optimizer=Optimizer(lr=0.03), recipe=SMALL)
    table = digits().train
    with monkeypatch.context() as patch:
        patch.setattr(bayes_error_noise, "bayes_error", lambda *a, **k: weight * bayes_error(*a, **k))
        found = method.protect(table)
    assert (method.estimate(found) > method.estimate(table) + 0.02) == (weight > 0)


def test_networks_are_trained_on_the_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Tensor]] = []
    original = Recipe.__call__

    def train(self: Recipe, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        seen.append((seed, table.inputs["pixel_values"]))
        return original(self, table, seed, run)

    monkeypatch.setattr(Recipe, "__call__", train)
    table = digits().train
    BayesErrorNoise(eps=0.1, steps=5, refresh=2, optimizer=Optimizer(lr=0.02), recipe=SMALL).protect(table)
    assert len(seen) == 3 and len({seed for seed, _ in seen}) == 3
    assert torch.equal(seen[0][1], table.inputs["pixel_values"])
    moves = [float((x - seen[0][1]).abs().mean()) for _, x in seen]
    assert moves[0] == 0 and moves[0] < moves[1] < moves[2]


def test_an_interruption_while_a_network_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of earlier renewals leave nothing behind that a later one would take for its own."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", -1.0)
    monkeypatch.setattr("engram.engine.fit.WORTH_KEEPING", -1.0)
    method, table = replace(BayesErrorNoise.tiny(), steps=6), digits().train
    whole = method.protect(table)
    real, left = _Loop._checkpoint, 8

    def die(self: _Loop) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            method.protect(table, Run(tmp_path))
    assert method.protect(table, Run(tmp_path)).digest == whole.digest


def test_a_table_that_cannot_be_protected() -> None:
    table = digits().train
    pixels, labels = table.inputs["pixel_values"], table.labels
    assert labels is not None
    numbers = Table({"values": pixels[:, 0]}, labels)
    wrong = {
        "class labels": [table.unlabelled(), table.with_labels(labels.float()), numbers],
        "without a label": [table.with_labels(torch.where(labels == 3, -1, labels))],
        "give uint8": [replace(table, inputs={"pixel_values": pixels.double()})],
        r"\[0, 1\]; these reach": [replace(table, inputs={"pixel_values": 2 * pixels - 1})],
    }
    for sentence, tables in wrong.items():
        for one in tables:
            with pytest.raises(EngramError, match=sentence):
                BayesErrorNoise.tiny().protect(one)


# --- clean and protected rows together


def test_a_share_of_the_rows_is_protected() -> None:
    clean = images(torch.uint8)
    protected = replace(clean, inputs={"pixel_values": 255 - clean.inputs["pixel_values"]})
    for share, count in ((0.0, 0), (0.3, 18), (0.5, 30), (1.0, 60)):
        found = mixed(clean, protected.take(range(60)[::-1]), share)
        changed = (found.inputs["pixel_values"] != clean.inputs["pixel_values"]).flatten(1).all(1)
        assert int(changed.sum()) == count and found.ids == clean.ids
        assert torch.equal(found.inputs["pixel_values"][changed], 255 - clean.inputs["pixel_values"][changed])
    one, same, other = (mixed(clean, protected, 0.5, seed).digest for seed in (0, 0, 1))
    assert one == same != other
    with pytest.raises(EngramError, match=r"share of 1\.5"):
        mixed(clean, protected, 1.5)
    with pytest.raises(EngramError, match="record id"):
        mixed(clean, protected.take(range(40)), 0.9)


@holds("provably-unlearnable-examples", 6)
def test_clean_and_protected_images_teach_less_than_the_clean_ones_alone() -> None:
    """On digits of 4 x 4 pixels, by a small CNN and a change of 0.15. Error-minimising noise of the same size takes
    less than a third of it, which is within what two networks differ by."""
    found = taught(0)
    assert found.rise > 0.1
    assert found.alone < -0.1
    assert found.both < -4 * BELOW
    assert found.minimising > found.both / 3


# --- the command

SET = ("eps=0.1", "steps=2", "recipe={network: {name: MLP, hidden: [8]}, epochs: 1}")


def protect(out: Path, *more: str, source: str = "sklearn:digits") -> int:
    settings = [word for pair in SET for word in ("--set", pair)]
    return main(["protect", "--data", source, "--method", "bayes-error-noise", "--out", str(out), *settings, *more])


def test_the_command_writes_a_table_that_reads_as_the_source_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = read("sklearn:digits"), tmp_path / "protected.parquet"
    assert protect(out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    found = read(out)
    assert found.ids == source.ids and found.names == source.names and found.shapes == source.shapes
    assert found.labels is not None and source.labels is not None and torch.equal(found.labels, source.labels)
    change = float((found.inputs["pixel_values"].double() - source.inputs["pixel_values"].double()).abs().max())
    assert 0 < change <= 0.1 + 1e-12
    assert told == {"method": "protect.BayesErrorNoise", "file": str(out), "rows": 1797, "largest_change": change}


def test_the_command_reads_files_of_images_and_keeps_further_columns(tmp_path: Path) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draws = np.random.default_rng(0)
    files = []
    for _ in range(8):
        stream = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(stream, "png")
        files.append(stream.getvalue())
    pets = {
        "key": list("abcdefgh"),
        "photo": files,
        "kind": ["dog", "cat"] * 4,
        "age": list(range(8)),
        "who": ["x"] * 8,
    }
    pq.write_table(pa.table(pets), tmp_path / "pets.parquet")
    roles = {"id": "key", "label": "kind", "image": "photo"}
    options = [word for role, name in roles.items() for word in (f"--{role}", name)]
    assert protect(tmp_path / "out.parquet", *options, source=str(tmp_path / "pets.parquet")) == 0
    source, found = (read(tmp_path / name, **roles) for name in ("pets.parquet", "out.parquet"))
    assert found.ids == source.ids and found.names == {0: "cat", 1: "dog"} and found.shapes == source.shapes
    assert found.labels is not None and source.labels is not None and torch.equal(found.labels, source.labels)
    assert found.extra["who"] == ["x"] * 8 and torch.equal(torch.as_tensor(found.extra["age"]), torch.arange(8))
    assert found.inputs["pixel_values"].dtype == torch.uint8
    levels = (found.inputs["pixel_values"].int() - source.inputs["pixel_values"].int()).abs()
    assert 0 < int(levels.max()) <= 25


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert protect(tmp_path / "x.csv") == 2
    assert "parquet" in capsys.readouterr().err
    assert protect(tmp_path / "x.parquet", source="sklearn:wine") == 2
    assert "pixel_values" in capsys.readouterr().err
    for name in ("ssd", "forget.SSD"):
        assert (
            main(["protect", "--data", "sklearn:digits", "--method", name, "--out", str(tmp_path / "x.parquet")]) == 2
        )
        assert name in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
