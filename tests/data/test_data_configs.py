"""Every YAML of conf/data composes, and its target takes every key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from hydra.utils import instantiate

from fff.data import InMemoryData, sources

CONF = Path(__file__).parents[2] / "conf"
pytestmark = pytest.mark.usefixtures("hydra_configs")
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))

TEXTS = (*sources.TEXTS, "wikitext")


def build(name, *overrides):
    return instantiate(compose(f"data/{name}", overrides=["+seed=3", *overrides]).data)


@pytest.mark.parametrize("name", NAMES)
def test_config_instantiates(name, monkeypatch, tmp_path):
    monkeypatch.setenv("FFF_DATA_DIR", str(tmp_path))
    data = build(name)
    assert isinstance(data, InMemoryData) and data.seed == 3
    assert data.batch_size == (32 if name in TEXTS else 256)
    if name in (*sources.NAMES, *TEXTS):
        assert data.name == name and data.root == (None if name == "digits" else str(tmp_path))


def test_each_set_has_a_config():
    assert set(NAMES) == {*sources.NAMES, *TEXTS, "clusters", "random_labels", "rotate"}


def test_root_is_optional(monkeypatch):
    monkeypatch.delenv("FFF_DATA_DIR", raising=False)
    assert build("usps").root is None


def test_random_labels_over_another_set():
    assert build("random_labels", "data@data.data=mnist", "data.fraction=0.5").data.name == "mnist"


def test_turned_pictures_of_cifar10():
    data = build("rotate")
    assert data.data.name == "cifar10" and list(data.blur) == [1.1, 2.2]
    assert build("rotate", "data@data.data=mnist").data.name == "mnist"
