"""Random changes of batches: what they may do to a row, and that nothing but the generator decides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.data.augment import (
    POLICY,
    RANGES,
    Augment,
    apply_steps,
    brighten,
    contrast,
    crop,
    flip,
    noise,
    steps_of_policy,
    two_views,
)
from engram.data.table import Batch, Table
from engram.engine.run import Run
from engram.errors import EngramError

NOTHING: dict[str, float] = {"shift": 0, "flip": 0, "brightness": 0, "contrast": 0, "noise": 0}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int) -> Tensor:
    return 1 + torch.rand(*shape, generator=draws(7))  # nothing is 0, which marks the padding


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """The image [C, H, W] moved, pixel by pixel, with zeros where nothing comes from."""
    _, height, width = image.shape
    found = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                found[:, i, j] = image[:, i - down, j - right]
    return found


def way(image: Tensor, found: Tensor, most: tuple[int, int]) -> list[tuple[int, int]]:
    """By how much it was moved: all that fit."""
    ways = [(d, r) for d in range(-most[0], most[0] + 1) for r in range(-most[1], most[1] + 1)]
    return [way for way in ways if torch.equal(moved(image, *way), found)]


@pytest.mark.parametrize("padding", [(1, 2), (2, 0), (0, 0)])
def test_a_crop_moves_each_image_as_a_whole_by_its_own_distance(padding: tuple[int, int]) -> None:
    x = images(120, 2, 5, 4)
    found = crop(x, padding, draws())
    ways = [way(image, new, padding) for image, new in zip(x, found, strict=True)]
    assert all(len(fitting) == 1 for fitting in ways)
    every = {(d, r) for d in range(-padding[0], padding[0] + 1) for r in range(-padding[1], padding[1] + 1)}
    assert {fitting[0] for fitting in ways} == every


def test_a_flip_mirrors_the_share_of_images_that_was_asked_for() -> None:
    x = images(1000, 1, 3, 4)
    mirrored = x[:, :, :, [3, 2, 1, 0]]
    assert torch.equal(flip(x, 0.0, draws()), x) and torch.equal(flip(x, 1.0, draws()), mirrored)
    found = flip(x, 0.3, draws())
    turned = (found == mirrored).flatten(1).all(1)
    assert torch.equal(found[~turned], x[~turned])
    assert abs(float(turned.double().mean()) - 0.3) < 4 * (0.3 * 0.7 / 1000) ** 0.5


def test_brightness_is_one_factor_an_image() -> None:
    x = images(500, 3, 2, 2)
    factors = (brighten(x, 0.4, draws()) / x).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-5)
    assert 0.6 <= float(factors.min()) < 0.61 and 1.39 < float(factors.max()) <= 1.4


def test_contrast_keeps_an_images_mean_and_scales_the_rest() -> None:
    x = images(500, 3, 2, 2)
    found = contrast(x, 0.5, draws())
    means = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(found.mean((1, 2, 3), keepdim=True), means, rtol=1e-5)
    factors = ((found - means) / (x - means)).flatten(1).median(1).values
    assert torch.allclose(found - means, factors[:, None, None, None] * (x - means), atol=1e-5)
    assert 0.5 <= float(factors.min()) < 0.51 and 1.49 < float(factors.max()) <= 1.5


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    x = images(400, 50)
    added = noise(x, 0.2, draws()) - x
    assert abs(float(added.mean())) < 4 * 0.2 / 20_000**0.5
    assert float(added.std()) == pytest.approx(0.2, rel=0.03)
    assert abs(float(torch.corrcoef(added.T).fill_diagonal_(0).mean())) < 0.01


@given(st.integers(0, 1000))
def test_the_generator_alone_decides(seed: int) -> None:
    everything = Augment(flip=0.5)
    inputs = {"pixel_values": images(6, 1, 8, 8), "values": images(6, 4)}
    one, again, other = (everything(inputs, draws(s)) for s in (seed, seed, seed + 1))
    for name in inputs:
        assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
        assert one[name].shape == inputs[name].shape and one[name].dtype == inputs[name].dtype


def test_steps_come_in_order_and_from_one_generator() -> None:
    x, g = images(5, 1, 8, 16), draws(3)
    found = Augment(shift=0.25, flip=0.5, brightness=0.2, contrast=0.3)({"pixel_values": x}, draws(3))
    wanted = contrast(brighten(flip(crop(x, (2, 4), g), 0.5, g), 0.2, g), 0.3, g)
    assert torch.equal(found["pixel_values"], wanted)
    vectors = images(5, 3)
    assert torch.equal(Augment(noise=0.3)({"values": vectors}, draws(3))["values"], noise(vectors, 0.3, draws(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_values_stays(dtype: torch.dtype) -> None:
    found = Augment(flip=0.5)({"a": images(3, 1, 8, 8).to(dtype), "b": images(3, 2).to(dtype)}, draws())
    assert {value.dtype for value in found.values()} == {dtype}


def test_inputs_stay_as_they_are_where_nothing_is_asked_for() -> None:
    inputs = {"pixel_values": images(3, 1, 8, 8), "values": images(3, 4), "input_ids": torch.arange(12).view(3, 4)}
    kept = {name: value.clone() for name, value in inputs.items()}
    still, changed = Augment(**NOTHING)(inputs, draws()), Augment()(inputs, draws())
    assert all(torch.equal(still[name], kept[name]) and torch.equal(inputs[name], kept[name]) for name in inputs)
    assert torch.equal(changed["input_ids"], kept["input_ids"])
    assert not torch.equal(changed["values"], kept["values"])


def test_two_views_are_the_batch_twice_changed_apart() -> None:
    batch = Batch(
        {"values": images(4, 3)}, torch.tensor([1, 0, 2, 1]), torch.tensor([9, 8, 7, 6]), {"w": torch.ones(4)}
    )
    found = two_views(batch, Augment(noise=0.1), draws(5))
    g = draws(5)
    wanted = torch.cat([noise(batch.inputs["values"], 0.1, g), noise(batch.inputs["values"], 0.1, g)])
    assert torch.equal(found.inputs["values"], wanted) and len(found) == 8
    assert not torch.equal(wanted[:4], wanted[4:])
    assert found.labels is not None and found.labels.tolist() == [1, 0, 2, 1] * 2
    assert found.rows.tolist() == [9, 8, 7, 6] * 2 and len(found.extra["w"]) == 8
    assert two_views(Batch(batch.inputs, None, batch.rows), Augment(), draws()).labels is None


def test_an_epoch_that_is_begun_again_has_the_same_views() -> None:
    """As after a resume: the draws of an epoch do not depend on those of the epochs before."""
    table = Table({"pixel_values": images(10, 1, 8, 8)})

    def epoch(run: Run, number: int) -> Tensor:
        g = run.generator("views", number)
        views = [two_views(batch, Augment(), g) for batch in table.batches(4, epoch=number)]
        return torch.cat([view.inputs["pixel_values"] for view in views])

    through = Run()
    first, second = (epoch(through, number) for number in range(2))
    assert torch.equal(epoch(Run(), 1), second) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "setting", [{"shift": 1.5}, {"flip": -0.1}, {"brightness": 2}, {"contrast": -1}, {"noise": -1}]
)
def test_a_value_outside_its_range_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(EngramError, match=f"{next(iter(setting))} of an augmentation"):
        Augment(**setting)


def test_rows_of_which_no_views_can_be_made_are_said() -> None:
    with pytest.raises(EngramError, match=r"images .* or vectors .* there is \{'input_ids': \(2, 3\)\}"):
        Augment()({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, draws())


# --- the policy


def levels(*shape: int) -> Tensor:
    """Images of 256 levels from 0 to 1."""
    return torch.randint(256, shape, generator=draws(3)) / 255


def test_a_sub_policy_happens_as_often_as_it_says() -> None:
    count, source = 20000, draws()
    drawn = [steps_of_policy(source) for _ in range(count)]
    for name in RANGES:
        wanted = sum(p for pair in POLICY for kind, p, _ in pair if kind == name) / len(POLICY)
        found = sum(kind == name for steps in drawn for kind, _ in steps) / count
        assert abs(found - wanted) < 4 * (2 * wanted / count) ** 0.5 + 1e-9
    moved = [strength for steps in drawn for kind, strength in steps if kind == "shear y"]
    assert {round(abs(s), 6) for s in moved} == {round(0.3 * 8 / 9, 6), round(0.3 * 7 / 9, 6)}
    assert abs(sum(s > 0 for s in moved) / len(moved) - 0.5) < 0.05
    assert {s for steps in drawn for kind, s in steps if kind == "solarize"} == {
        1 - 2 / 9,
        1 - 5 / 9,
        1 - 8 / 9,
        1 - 3 / 9,
    }
    assert len(POLICY) == 25 and all(kind in RANGES for pair in POLICY for kind, _, _ in pair)


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("channels", [1, 3])
def test_an_operation_stays_in_range_and_looks_at_one_image_alone(name: str, channels: int) -> None:
    x, strength = levels(5, channels, 8, 8), RANGES[name][1]
    before = x.clone()
    for signed in {strength, -strength} if RANGES[name][2] else {strength}:
        found = apply_steps(x, ((name, signed),))
        assert float(found.min()) >= 0 and float(found.max()) <= 1 and found.shape == x.shape
        assert torch.allclose(found[2:3], apply_steps(x[2:3], ((name, signed),)), atol=1e-6)
        assert torch.allclose(found, x, atol=1e-6) == (name == "color" and channels == 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [name for name, (_, _, signed) in RANGES.items() if signed])
def test_an_operation_of_strength_nothing_changes_nothing(name: str) -> None:
    x = levels(3, 3, 6, 6)
    assert torch.allclose(apply_steps(x, ((name, 0.0),)), x, atol=1e-5)


def test_moves_by_whole_pixels_and_quarter_turns() -> None:
    x = levels(2, 1, 8, 8)
    right = apply_steps(x, (("shift x", 2 / 8),))
    assert torch.allclose(right[..., :-2], x[..., 2:], atol=1e-5) and torch.allclose(right[..., -2:], torch.tensor(0.5))
    down = apply_steps(x, (("shift y", -1 / 8),))
    assert torch.allclose(down[:, :, 1:], x[:, :, :-1], atol=1e-5)
    turned = apply_steps(x, (("rotate", 90.0),))
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, x.rot90(-1, (2, 3)), atol=1e-5
    )
    sheared = apply_steps(x, (("shear x", 0.3),))
    assert torch.allclose(sheared.mean(), x.mean(), atol=0.1) and not torch.allclose(sheared, x, atol=0.1)


def test_pixel_operations_by_hand() -> None:
    x = torch.tensor([0.0, 51.0, 102.0, 255.0]).view(1, 1, 2, 2) / 255
    wanted = {
        ("invert", 0.0): [255, 204, 153, 0],
        ("solarize", 0.3): [0, 51, 153, 0],  # from 0.3 on inverted
        ("posterize", 4.0): [0, 48, 96, 240],  # the four highest bits
        ("brightness", -0.5): [0, 25.5, 51, 127.5],
        ("contrast", -1.0): [102, 102, 102, 102],
        ("contrast", 0.5): [0, 25.5, 102, 255],
        ("equalize", 0.0): [0, 85, 170, 255],
    }
    for step, values in wanted.items():
        assert (255 * apply_steps(x, (step,))).flatten().tolist() == pytest.approx(values, abs=1e-3), step
    half = 0.25 + x / 2
    assert torch.allclose(apply_steps(half, (("autocontrast", 0.0),)), x, atol=1e-6)
    one = torch.full((1, 1, 3, 3), 0.4)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(apply_steps(one, ((name, 0.0),)), one)


def test_colour_and_sharpness_by_hand() -> None:
    x = levels(1, 3, 5, 5)
    grey = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert torch.allclose(apply_steps(x, (("color", -1.0),)), grey[:, None].expand_as(x), atol=1e-6)
    blurred = apply_steps(x, (("sharpness", -1.0),))
    middle = (x[:, :, 1:4, 1:4].sum((2, 3)) + 4 * x[:, :, 2, 2]) / 13
    assert torch.allclose(blurred[:, :, 2, 2], middle, atol=1e-6)
    assert torch.equal(blurred[:, :, 0], x[:, :, 0]) and torch.equal(blurred[..., -1], x[..., -1])


def test_sub_policies_follow_the_generator_alone() -> None:
    one, other = ([steps_of_policy(source) for _ in range(20)] for source in (draws(4), draws(4)))
    assert one == other != [steps_of_policy(draws(5)) for _ in range(20)]
