"""Image sets: digits, synthetic folders in the Hub's schema, real copies where FFF_DATA_DIR is set; cache, errors."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fff.data import ImageData, RandomLabels, digest, hub, image_cache, sources


def write_folder(folder: Path, *, image="image", label="label", num_classes=3, shape=(4, 5, 3), rows=(30, 12), seed=0):
    """Parquet files as the Hub has them, with labels in a ClassLabel column; returns pixels and labels per split."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"class {i}" for i in range(num_classes)]
    features = {image: ImageFeature(), label: ClassLabel(names=names)}
    if label == "fine_label":
        features["coarse_label"] = ClassLabel(names=["coarse"])
    written = {}
    for split, num_rows in zip(("train", "test"), rows, strict=True):
        x = rng.integers(0, 256, (num_rows, *shape), dtype=np.uint8)
        y = rng.integers(0, num_classes, num_rows)
        columns = {image: [Image.fromarray(pixels) for pixels in x], label: y.tolist()}
        if "coarse_label" in features:
            columns["coarse_label"] = [0] * num_rows
        table = Dataset.from_dict(columns, features=Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        written[split] = torch.from_numpy(x), torch.from_numpy(y)
    return written


@pytest.fixture
def digits(cache_dir):
    return ImageData("digits", cache_dir=cache_dir)


def test_digits_shapes_and_split(digits):
    from sklearn.datasets import load_digits

    rows = digits.rows
    assert digits.in_shape == (1, 8, 8) and digits.in_features == 64 and digits.num_classes == 10
    assert (len(rows.train_y), len(rows.test_y)) == (1442, 355)
    # The two parts are the 1797 rows of scikit-learn, once each, and every class keeps its share.
    source = load_digits()
    both = torch.cat([rows.train_x, rows.test_x]).flatten(1).numpy()
    assert np.array_equal(np.sort(both.dot(np.arange(1, 65))), np.sort(source.data.dot(np.arange(1, 65)).astype(int)))
    for label in range(10):
        share = int((rows.test_y == label).sum()) / int((source.target == label).sum())
        assert share == pytest.approx(0.2, abs=0.01)


def test_batches_are_standardised(digits):
    x = torch.cat([x for x, _ in digits.train_eval_dataloader()] + [x for x, _ in digits.val_dataloader()])
    assert x.dtype == torch.float32 and x.shape == (1442, 1, 8, 8)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5) and float(x.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("normalize", "low", "high"), [("unit", 0, 1), ("symmetric", -1, 1)])
def test_normalize_ranges(cache_dir, normalize, low, high):
    data = ImageData("digits", cache_dir=cache_dir, normalize=normalize)
    ((x, _),) = data.test_dataloader()
    assert (float(x.min()), float(x.max())) == (low, high)
    white = data.rows.test_x == 16
    assert bool((x[white] == high).all())


def test_validation_rows_are_a_fixed_tenth(cache_dir, digits):
    train, val = digits.train_rows, digits.val_rows
    assert len(val) == 144 and len(train) == 1298
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1442))
    other_run = ImageData("digits", cache_dir=cache_dir, seed=5)
    assert torch.equal(other_run.val_rows, val)
    other_split = ImageData("digits", cache_dir=cache_dir, split_seed=1)
    assert not torch.equal(other_split.val_rows, val)
    assert sum(len(y) for _, y in digits.val_dataloader()) == 144


def test_run_seed_changes_the_order_alone(cache_dir, digits):
    other_run = ImageData("digits", cache_dir=cache_dir, seed=1)
    (_, a), (_, b) = next(iter(digits.train_dataloader())), next(iter(other_run.train_dataloader()))
    assert not torch.equal(a, b) and torch.equal(other_run.train_rows, digits.train_rows)


@pytest.mark.parametrize(
    ("name", "columns", "shape", "in_shape"),
    [
        ("mnist", {}, (6, 5), (1, 6, 5)),
        ("cifar10", {"image": "img"}, (4, 5, 3), (3, 4, 5)),
        ("cifar100", {"image": "img", "label": "fine_label"}, (4, 5, 3), (3, 4, 5)),
        ("svhn", {}, (4, 5, 3), (3, 4, 5)),
    ],
)
def test_folder_in_the_hub_schema(tmp_path, no_hub, name, columns, shape, in_shape):
    written = write_folder(tmp_path / "root" / name, shape=shape, **columns)
    data = ImageData(name, root=tmp_path / "root", cache_dir=tmp_path / "cache", normalize="unit")
    assert data.in_shape == in_shape and data.class_names == ["class 0", "class 1", "class 2"]
    ((x, y),) = data.test_dataloader()
    pixels = written["test"][0].to(torch.float32) / 255
    torch.testing.assert_close(x, pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2))
    assert torch.equal(y, written["test"][1]) and torch.equal(data.rows.train_y, written["train"][1])
    # One mean and one deviation per channel, of the training split.
    channels = written["train"][0].reshape(-1, in_shape[0]).to(torch.float64) / 255
    images = image_cache.load_images(name, tmp_path / "root", tmp_path / "cache")
    assert images.mean == pytest.approx(channels.mean(0).tolist(), abs=1e-6)
    assert images.std == pytest.approx(channels.std(0, correction=0).tolist(), abs=1e-6)


def test_clone_of_the_svhn_repository(tmp_path, no_hub):
    """It holds two configurations, the default one without a label column."""
    folder = tmp_path / "root" / "svhn"
    written = write_folder(folder / "cropped_digits")
    write_folder(folder / "full_numbers", label="digits", seed=1)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n{default}  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
            for config, default in (("full_numbers", "  default: true\n"), ("cropped_digits", ""))
        )
        + "---\n"
    )
    data = ImageData("svhn", root=tmp_path / "root", cache_dir=tmp_path / "cache")
    assert torch.equal(data.rows.test_y, written["test"][1])


def test_changed_files_are_decoded_anew(tmp_path, no_hub):
    root = tmp_path / "root"
    write_folder(root / "mnist", shape=(4, 5))
    first = image_cache.load_images("mnist", root, tmp_path / "cache")
    written = write_folder(root / "mnist", shape=(4, 5), seed=1)
    second = image_cache.load_images("mnist", root, tmp_path / "cache")
    assert not torch.equal(first.train_x, second.train_x)
    assert torch.equal(second.train_x[:, 0], written["train"][0])


def test_other_rows_than_the_published_ones_are_told(tmp_path, no_hub):
    root = tmp_path / "root"
    write_folder(root / "usps", shape=(4, 5))
    for _ in ("decoded", "from the cache"):
        with pytest.warns(UserWarning, match=f"{root / 'usps'} holds rows of digest .* those of c342bdef1aac1d15"):
            image_cache.load_images("usps", root, tmp_path / "cache")


def test_digest_names_the_content(tmp_path, no_hub):
    root, cache = tmp_path / "root", tmp_path / "cache"
    assert sources.stored_digest("mnist", root, cache) is None
    digests = []
    for seed in (0, 1, 0):
        write_folder(root / "mnist", shape=(4, 5), seed=seed)
        data = ImageData("mnist", root=root, cache_dir=cache)
        digests.append(data.content_digest)
        assert sources.stored_digest("mnist", root, cache) == data.content_digest
        assert digest.content_digest(data.rows[:4]) == data.content_digest
    assert digests[0] == digests[2] != digests[1]
    corrupted = RandomLabels(data)
    assert corrupted.content_digest not in digests
    assert corrupted.content_digest == RandomLabels(data).content_digest != RandomLabels(data, 0.5).content_digest


def test_damaged_cache_is_replaced(tmp_path):
    first = image_cache.load_images("digits", None, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    again = image_cache.load_images("digits", None, tmp_path)
    assert torch.equal(again.train_x, first.train_x) and path.read_bytes() == whole


def test_workers_may_fill_the_cache_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_read_cache", lambda path: None)  # every worker finds nothing and writes
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: image_cache.load_images("digits", None, tmp_path), range(8)))
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()  # one file, no part left behind
    assert torch.equal(image_cache.load_images("digits", None, tmp_path).train_x, results[0].train_x)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(image_cache, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        image_cache.load_images("digits", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources._cache_folder(None) == tmp_path / "fff"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert sources._cache_folder(None) == Path.home() / ".cache" / "fff"


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_missing_set_offline(tmp_path, no_hub):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        ImageData("usps", root=tmp_path, cache_dir=tmp_path / "cache").setup()
    assert time.perf_counter() - start < 3
    text = one_line(caught.value)
    assert "'usps'" in text and str(tmp_path / "usps") in text and "'flwrlabs/usps'" in text


def test_missing_set_without_network(tmp_path, monkeypatch):
    """The host refuses connections, or its name look-up never ends."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(FileNotFoundError, match="FFF_DATA_DIR.*host unreachable"):
        image_cache.load_images("svhn", None, tmp_path)

    def answer_late(*args, **keywords):
        time.sleep(4)
        raise TimeoutError

    monkeypatch.setattr(sources.socket, "create_connection", answer_late)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="host unreachable"):
        image_cache.load_images("svhn", None, tmp_path)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("stored", ["hub/datasets--ufldl-stanford--svhn", "datasets/ufldl-stanford___svhn"])
def test_missing_set_in_offline_mode(tmp_path, monkeypatch, no_hub, stored):
    """Offline from the start: the Hub client is asked for what it has stored, if it has stored anything."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    huggingface_hub.close_session()
    with pytest.raises(FileNotFoundError, match="'svhn' not found.*'ufldl-stanford/svhn' .offline"):
        image_cache.load_images("svhn", None, tmp_path)
    (tmp_path / "hf" / stored).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="'svhn' not found.*'ufldl-stanford/svhn' .ConnectionError"):
        image_cache.load_images("svhn", None, tmp_path)
    huggingface_hub.close_session()


def test_availability_is_known_without_torch(tmp_path):
    code = (
        "import sys, fff.data; from fff.data.sources import check_available, stored_digest;"
        "check_available('digits'); stored_digest('digits');"
        "assert not {'torch', 'lightning', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_names_are_those_with_a_source():
    assert set(sources.NAMES) == {"digits", *sources.SOURCES}


def test_what_the_hub_is_asked_for(tmp_path, monkeypatch):
    """Clones of two repositories stand in for the Hub; the request itself needs a network."""
    import datasets

    written = write_folder(tmp_path / "ufldl-stanford/svhn/cropped_digits")
    write_folder(tmp_path / "ufldl-stanford/svhn/full_numbers", label="digits", seed=1)
    write_folder(tmp_path / "flwrlabs/usps/data", shape=(4, 5))
    load_dataset, asked = datasets.load_dataset, {}

    def from_clone(hub_id, *, revision, **options):
        asked[hub_id] = revision
        return load_dataset(str(tmp_path / hub_id), cache_dir=tmp_path / "arrow", **options)

    monkeypatch.setattr(datasets, "load_dataset", from_clone)
    monkeypatch.setattr(sources, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(sources, "_hub_reachable", lambda: True)
    images = image_cache.load_images("svhn", None, tmp_path / "cache")
    assert torch.equal(images.test_y, written["test"][1])
    with pytest.warns(UserWarning, match="flwrlabs/usps holds rows of digest .* those of c342bdef1aac1d15"):
        image_cache.load_images("usps", None, tmp_path / "cache")
    assert asked == {source.hub_id: source.revision for source in map(sources.SOURCES.get, ("svhn", "usps"))}
    asked.clear()
    image_cache.load_images("svhn", tmp_path / "no such root", tmp_path / "cache")
    assert not asked  # from the cache


def test_proxy_is_what_must_be_reachable(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(sources.socket, "create_connection", connect)
    monkeypatch.setattr(sources.urllib.request, "getproxies", lambda: {"https": "http://proxy.test:3128"})
    assert sources._hub_reachable()
    monkeypatch.setattr(sources.urllib.request, "getproxies", dict)
    assert sources._hub_reachable()
    assert asked == [("proxy.test", 3128), ("huggingface.co", 443)]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "imagenet"}, "name must be one of digits, usps.*'imagenet'"),
        ({"name": "digits", "normalize": "none"}, "normalize must be one of.*'none'"),
        ({"name": "digits", "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**keywords).setup()


def test_folder_with_other_columns(tmp_path, no_hub):
    write_folder(tmp_path / "cifar10", image="picture")
    with pytest.raises(ValueError, match=r"no column 'img', only \['picture', 'label'\]"):
        ImageData("cifar10", root=tmp_path, cache_dir=tmp_path / "cache").setup()


def test_usps(real_root, cache_dir):
    data = ImageData("usps", root=real_root, cache_dir=cache_dir)
    rows = data.rows
    assert (len(rows.train_y), len(rows.test_y)) == (7291, 2007)
    assert data.in_shape == (1, 16, 16) and data.class_names == [str(digit) for digit in range(10)]
    # Official order (first rows on the Hub's page) and official class counts.
    assert rows.train_y[:10].tolist() == [6, 5, 4, 7, 3, 6, 3, 1, 0, 1]
    assert torch.bincount(rows.train_y).tolist() == [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
    assert len(data.val_rows) == 729
    images = image_cache.load_images("usps", real_root, cache_dir)
    assert images.digest == data.content_digest == sources.SOURCES["usps"].digest


def test_mnist(real_root, cache_dir):
    images = image_cache.load_images("mnist", real_root, cache_dir)
    assert (len(images.train_y), len(images.test_y)) == (60_000, 10_000)
    # Published first labels, and the mean and deviation that every MNIST example uses.
    assert images.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert images.test_y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.mean == pytest.approx([0.1307], abs=5e-5) and images.std == pytest.approx([0.3081], abs=5e-5)


def test_cache_hit_is_fast_and_needs_no_datasets(real_root, cache_dir, monkeypatch):
    image_cache.load_images("mnist", real_root, cache_dir)
    monkeypatch.setitem(sys.modules, "datasets", None)  # its import would raise
    start = time.perf_counter()
    data = ImageData("mnist", root=real_root, cache_dir=cache_dir)
    data.setup()
    assert time.perf_counter() - start < 0.1
    assert len(data.rows.train_y) == 60_000
