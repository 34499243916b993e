"""Turned pictures: which way, which rows, what is blurred, and that smoothness does not give the answer away."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fff.data import ClusterData, ImageData, RotatedImages
from fff.data.rotate import blurred, rotated


@pytest.fixture(scope="module")
def digits(cache_dir):
    return ImageData("digits", cache_dir=cache_dir, batch_size=100, seed=4, split_seed=2)


def centre(x):
    """(x, y) centre of mass of one picture (S, S), from its middle, y upwards."""
    at = torch.arange(len(x), dtype=torch.float64) - (len(x) - 1) / 2
    return float((x.sum(0) * at).sum() / x.sum()), -float((x.sum(1) * at).sum() / x.sum())


@pytest.mark.parametrize("turned, angle", [(0, 0.0), (1, torch.pi / 6)])
def test_a_blob_goes_where_geometry_says(turned, angle):
    """Counterclockwise about the middle, and 4/3 as far from it; a bilinear blob is off by less than a tenth pixel."""
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    x[0, 0, 13:15, 20:22] = 1.0
    at = torch.complex(*torch.tensor(centre(x[0, 0]), dtype=torch.float64))
    expected = at * torch.polar(torch.tensor(4 / 3), torch.tensor(angle)).to(at.dtype)
    got = centre(rotated(x, torch.tensor([turned]))[0, 0])
    assert got == pytest.approx((float(expected.real), float(expected.imag)), abs=0.1)


def test_a_plain_picture_stays_as_it_is_up_to_its_corners():
    x = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(rotated(x, torch.tensor([0, 1])), x)
    assert torch.equal(blurred(x, torch.tensor([1.1, 2.2])), x)


def test_halves(digits):
    data = RotatedImages(digits, blur=None)
    rows = data.rows
    assert (int(rows.train_y.sum()), int(rows.test_y.sum())) == (1442 // 2, 355 // 2)
    assert data.num_classes == 2 and data.in_shape == digits.in_shape and rows.train_x.dtype == torch.uint8
    same, other = RotatedImages(digits, blur=None), RotatedImages(digits, blur=None, rotate_seed=1)
    assert torch.equal(same.rows.train_x, rows.train_x) and not torch.equal(other.rows.train_y, rows.train_y)
    assert same.content_digest == data.content_digest not in (other.content_digest, digits.content_digest)
    assert torch.equal(data.val_rows, digits.val_rows) and data.batch_size == 100 and data.seed == 4
    upright = rows.test_y == 0
    assert torch.equal(rows.test_x[upright], rotated(digits.rows.test_x, torch.zeros(355))[upright])
    assert torch.equal(rows.test_x[~upright], rotated(digits.rows.test_x, torch.ones(355))[~upright])


@pytest.mark.parametrize("seed", [0, 1])
def test_half_of_the_validation_rows_are_turned_by_whatever_seeds(cache_dir, seed):
    """The same seed for split and rotation would pick the same rows; one standard deviation of a guess is 0.04."""
    data = RotatedImages(ImageData("digits", cache_dir=cache_dir, split_seed=seed), blur=None, rotate_seed=seed)
    assert data.rows.train_y[data.val_rows].double().mean() == pytest.approx(0.5, abs=0.16)


def test_augmented_pictures_are_refused(cache_dir):
    with pytest.raises(ValueError, match="must not be augmented"):
        RotatedImages(ImageData("digits", cache_dir=cache_dir, augment="affine")).setup()


def test_clusters_are_the_classes_of_the_test_rows(digits):
    data = RotatedImages(digits)
    assert torch.equal(data.test_cluster, digits.rows.test_y)  # before any set-up
    assert len(torch.cat([y for _, y in data.test_dataloader()])) == len(data.test_cluster)


def test_blur_is_on_training_rows_alone(digits):
    sharp, data = RotatedImages(digits, blur=None), RotatedImages(digits)
    assert torch.equal(data.rows.train_y, sharp.rows.train_y) and torch.equal(data.rows.test_x, sharp.rows.test_x)
    changed = (data.rows.train_x != sharp.rows.train_x).flatten(1).any(1)
    assert torch.equal(changed.nonzero().flatten(), data.train_rows)


def test_blur_of_all_rows(digits):
    """Training rows by the same deviations and labels as before, if there are no others."""
    sharp, data = RotatedImages(digits, blur=None), RotatedImages(digits, blur=(2.0, 2.0), blurred_rows="all")
    for split in ("train", "test"):
        assert torch.equal(getattr(data.rows, f"{split}_y"), getattr(sharp.rows, f"{split}_y"))
        x = getattr(sharp.rows, f"{split}_x")
        assert torch.equal(getattr(data.rows, f"{split}_x"), blurred(x, torch.full((len(x),), 2.0)))
    with pytest.raises(ValueError, match="blurred_rows='test'"):
        RotatedImages(digits, blurred_rows="test")


def test_blur_is_a_normal_kernel_of_seven_by_three():
    x = torch.zeros(2, 1, 15, 15)
    x[:, 0, 7, 7] = 1.0
    for picture, sigma in zip(blurred(x, torch.tensor([1.1, 2.2])), (1.1, 2.2), strict=True):
        rows, columns = (torch.exp(-0.5 * (torch.arange(-r, r + 1) / sigma) ** 2) for r in (3, 1))
        kernel = torch.outer(rows / rows.sum(), columns / columns.sum())
        torch.testing.assert_close(picture[0], F.pad(kernel, (6, 6, 4, 4)))


def bands(x):
    """Log energy in 15 rings of the windowed power spectrum: it knows no direction."""
    grey = x.float().mean(1) / 255
    window = torch.hann_window(32, periodic=False)
    power = torch.fft.rfft2((grey - grey.mean((1, 2), keepdim=True)) * torch.outer(window, window)).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32))
    edges = torch.linspace(0.03, 0.72, 16)
    rings = [power[:, (radius >= a) & (radius < b)].sum(1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return (torch.stack(rings, 1) + 1e-4).log()


def least_squares_accuracy(x, y):
    """Of a linear classifier on the second half of the rows, fitted to the first."""
    x, half = F.pad((x - x.mean(0)) / x.std(0), (0, 1), value=1.0).double(), len(y) // 2
    weight = torch.linalg.lstsq(x[:half], 2.0 * y[:half, None].double() - 1).solution
    return float(((x[half:] @ weight > 0).flatten() == (y[half:] == 1)).double().mean())


def test_smoothness_does_not_tell_the_answer(real_root):
    """On 6000 pictures of CIFAR-10; one standard deviation of a guess is 0.9 %. Where upright pictures are only cropped
    and enlarged, the same measure finds the answer: a check that it can."""
    x = ImageData("cifar10", root=real_root).rows.test_x[:6000]
    turned = torch.arange(6000) % 2
    fair = rotated(x, turned)
    assert least_squares_accuracy(bands(fair), turned) < 0.65
    energy = bands(fair)[:, 5:].exp().sum(1, keepdim=True).log() - bands(fair).exp().sum(1, keepdim=True).log()
    assert least_squares_accuracy(energy, turned) < 0.53
    upright = F.interpolate(x[:, :, 4:28, 4:28].float(), size=32, mode="bilinear").round().to(torch.uint8)
    assert least_squares_accuracy(bands(torch.where(turned.view(-1, 1, 1, 1) == 1, fair, upright)), turned) > 0.8


@pytest.mark.parametrize("blur", [(2.0, 1.0), (0.0, 1.0), (1.0,)])
def test_bad_blur(digits, blur):
    with pytest.raises(ValueError, match="blur must be None or two numbers, 0 < low <= high, got"):
        RotatedImages(digits, blur=blur)


def test_what_is_no_square_picture_is_refused():
    with pytest.raises(ValueError, match="data must hold square images .*50"):
        RotatedImages(ClusterData(1)).setup()
