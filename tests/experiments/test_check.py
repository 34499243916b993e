"""Arguments are read from source: through re-exports, base classes, aliases, and without importing the target."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experiments.check import ConfigError, check, parameters_of


@dataclass
class Inner:
    epochs: int = 1
    device: str = field(default="cpu", metadata={"choices": ("cpu", "gpu")})


@dataclass
class Root:
    layer: Any = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "target, argument",
    [
        ("fff.FFF", "depth"),  # through the table of homes
        ("fff.layers.fff.FFF", "depth"),
        ("fff.tasks.Classification", "label_smoothing"),  # from ... import in a package
        ("torch.optim.AdamW", "weight_decay"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", "patience"),
        ("lightning.pytorch.loggers.CSVLogger", "flush_logs_every_n_steps"),
    ],
)
def test_arguments_are_found(target, argument):
    parameters = parameters_of(target)
    assert argument in parameters.annotations and "self" not in parameters.annotations and not parameters.open


def test_constructor_of_a_base_class_and_relative_imports(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Child as Renamed\n")
    (package / "inner.py").write_text(
        "from ._base import Base\nclass Child(Base):\n    pass\ndef free(a, *, b: int, **rest): ...\nraise SystemExit\n"
    )
    (package / "_base.py").write_text("class Base:\n    def __init__(self, size: int | None): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(parameters_of("some_package.Renamed").annotations) == ["size"]
    assert parameters_of("some_package.inner.free").open
    assert parameters_of("some_package.inner.absent") is None
    assert parameters_of("no_such_package.Class") is None
    check({"layer": {"_target_": "some_package.Renamed", "size": None}, "inner": {}}, Root)
    with pytest.raises(ConfigError, match=r"layer.size='x': some_package.Renamed takes int or None here"):
        check({"layer": {"_target_": "some_package.Renamed", "size": "x"}, "inner": {}}, Root)


def layer(**arguments):
    return {"layer": {"_target_": "fff.FFF", "_partial_": True, **arguments}, "inner": {"epochs": 1}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 3, "mode": "gated", "hardening_weight": 3, "glu": True, "beam_width": None},
        {"act_layer": {"_target_": "torch.nn.GELU", "_partial_": True}},
        {"depth": "${elsewhere}"},
        {"act_layer": "relu2"},
    ],
)
def test_valid_nodes_pass(arguments):
    check(layer(**arguments), Root)


@pytest.mark.parametrize(
    "config, words",
    [
        (layer(dpth=3), ["layer.dpth", "fff.FFF", "'depth'"]),
        (layer(depth="3"), ["layer.depth='3'", "fff.FFF", "int"]),
        (layer(depth=True), ["layer.depth=True", "int"]),
        (layer(depth=2.0), ["layer.depth=2.0", "int"]),
        (layer(depth=None), ["layer.depth=None", "int"]),
        (
            layer(act_layer="rellu"),
            ["layer.act_layer='rellu'", "relu or gelu", "_target_"],
        ),  # an alias of another module
        (layer(mode="sof"), ["layer.mode='sof'", "soft or straight_through or gated"]),  # an alias of a Literal
        (
            layer(act_layer={"_target_": "torch.nn.GELU", "aproximate": "none"}),
            ["layer.act_layer.aproximate", "'approx"],
        ),
        ({"layer": {"_target_": "fff.FFFF"}, "inner": {}}, ["layer._target_", "'fff.FFFF'", "'FFF'"]),
        ({"layer": [{"_target_": "fff.FFF", "dept": 1}], "inner": {}}, ["layer[0].dept"]),
        ({"layer": None, "inner": {"epoch": 1}}, ["inner.epoch", "'epochs'"]),
        ({"layer": None, "inner": {"device": "cpuu"}}, ["inner.device='cpuu'", "cpu or gpu"]),
        ({"layer": None, "inner": {}, "lyer": 1}, ["lyer", "'layer'"]),
        ({"layer": None, "inner": {}, "zzz": 1}, ["zzz", "layer, inner"]),
    ],
)
def test_mistakes_are_told_in_one_line(config, words):
    with pytest.raises(ConfigError) as error:
        check(config, Root)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_nothing_is_imported():
    code = (
        "import sys; from experiments.check import parameters_of;"
        "assert parameters_of('torch.optim.AdamW') and parameters_of('fff.tasks.Classification');"
        "assert not {'torch', 'lightning', 'fff'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
