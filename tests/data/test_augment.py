"""Augmentation does what it says, to training batches alone, and the same again for the same seed, epoch and batch."""

import math

import pytest
import torch

from fff.data import Batches, ImageData, RandomLabels
from fff.data.augment import random_affine

STILL = {"degrees": 0.0, "translate": 0.0, "scale": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(rows, side=32):
    """Images whose two channels hold the place of each pixel, right and down, in pixels from the middle."""
    place = torch.arange(side) - (side - 1) / 2
    return torch.stack(torch.meshgrid(place, place, indexing="xy")).expand(rows, 2, side, side)


def middle(x, reach=4):
    """Of coordinate images the part around the middle, which nothing from outside has entered."""
    half = x.shape[-1] // 2
    return x[..., half - reach : half + reach, half - reach : half + reach]


def test_without_strength_nothing_changes():
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(random_affine(x, generator(), **STILL), x)


def test_flips_are_those_of_torch_and_each_comes():
    x = torch.randn(64, 3, 8, 8)
    y = random_affine(x, generator(), flips=True, **STILL)
    found = [
        [axes for axes in ([], [2], [1], [1, 2]) if torch.allclose(new, old.flip(axes), atol=1e-5)]
        for old, new in zip(x, y, strict=True)
    ]
    assert all(len(axes) == 1 for axes in found)
    counts = [sum(axes == [one] for axes in found) for one in ([], [2], [1], [1, 2])]
    assert all(6 <= count <= 26 for count in counts), "16 of each are expected, with a deviation of 3.5"


def test_a_shift_moves_all_pixels_alike_and_no_further_than_asked():
    x = coordinates(200)
    moved = middle(random_affine(x, generator(), **{**STILL, "translate": 1 / 8}) - x)
    shift = moved[:, :, 0, 0]
    torch.testing.assert_close(moved, shift[..., None, None].expand_as(moved), rtol=0, atol=1e-4)
    assert 3.5 < shift.abs().max() <= 4 + 1e-4 and shift.abs().mean().item() == pytest.approx(2, abs=0.2)
    assert shift.mean(0).abs().max() < 0.5 and abs(torch.corrcoef(shift.T)[0, 1]) < 0.2


def test_what_comes_in_repeats_the_border():
    x = coordinates(50)
    y = random_affine(x, generator(), **{**STILL, "translate": 0.5})
    assert y.abs().max() <= 15.5


def test_each_image_is_turned_and_scaled_by_numbers_of_its_own():
    y = middle(random_affine(coordinates(400), generator(), degrees=15.0, translate=0.0, scale=0.1))
    across = (y[..., :, -1] - y[..., :, 0]).mean(-1) / 7  # (B, 2): where a step to the right goes in the source
    down = (y[..., -1, :] - y[..., 0, :]).mean(-1) / 7
    size = 1 / across.norm(dim=1)
    angle = torch.atan2(across[:, 1], across[:, 0]).rad2deg()
    torch.testing.assert_close(down, torch.stack([-across[:, 1], across[:, 0]], 1), rtol=0, atol=1e-3)
    for value, low, high in ((size, 0.9, 1.1), (angle, -15, 15)):
        span = high - low
        assert low - 1e-3 <= value.min() < low + 0.05 * span and high - 0.05 * span < value.max() <= high + 1e-3
        assert value.std().item() == pytest.approx(span / math.sqrt(12), rel=0.1)


def loader(**keywords):
    x = torch.arange(23 * 16, dtype=torch.float32).view(23, 1, 4, 4)
    return Batches(x, torch.arange(23), torch.arange(23), 5, **{"seed": 3, "augment": random_affine, **keywords})


def test_a_batch_is_a_function_of_seed_epoch_and_position():
    batches = loader()
    first, again = ([x for x, _ in batches] for _ in range(2))
    assert all(map(torch.equal, first, again))
    batches.set_epoch(1)
    second = list(batches)
    whole = {int(y): x for xs, ys in second for x, y in zip(xs, ys, strict=True)}
    batches.set_epoch(0)
    for xs, ys in batches:
        assert not any(torch.equal(x, whole[int(y)]) for x, y in zip(xs, ys, strict=True))

    running = iter(batches)
    next(running), next(running)
    resumed = loader()
    resumed.load_state_dict(batches.state_dict())
    assert all(map(torch.equal, [x for x, _ in resumed], first[2:]))


def test_the_order_of_the_rows_is_that_of_a_run_without():
    assert [y.tolist() for _, y in loader()] == [y.tolist() for _, y in loader(augment=None)]


def test_unshuffled_rows_are_not_augmented():
    with pytest.raises(ValueError, match="augment=.* needs a seed"):
        loader(seed=None)


@pytest.mark.parametrize("wrap", [lambda data: data, RandomLabels])
def test_training_batches_alone_are_augmented(cache_dir, wrap):
    plain, data = (wrap(ImageData("digits", cache_dir=cache_dir, augment=augment)) for augment in (None, "affine"))
    for name, same in (("train", False), ("train_eval", True), ("val", True), ("test", True)):
        (x, y), (expected_x, expected_y) = (next(iter(getattr(d, f"{name}_dataloader")())) for d in (data, plain))
        assert torch.equal(y, expected_y) and torch.equal(x, expected_x) == same
    assert data.content_digest == plain.content_digest


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="augment must be one of affine, affine_flips, or None, got 'afine'"):
        ImageData("digits", augment="afine")
