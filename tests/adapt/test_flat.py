"""The flat file of a tree, as its reader in C computes it."""

import shutil
import subprocess
from functools import partial

import pytest
import torch

import fff
from fff.adapt import flat, to_flat
from fff.ops.activation import ACTIVATIONS

SOURCE = flat.__file__.replace(".py", ".c")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """run(file, rows as bytes) starts the compiled reader."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("flat") / "flat"
    subprocess.run([compiler, "-O2", "-o", program, SOURCE, "-lm"], check=True)
    return lambda file, rows: subprocess.run([program, file], input=rows, capture_output=True)


def randomised(layer):
    """Hidden units and decisions of size 1, biases that show; and a decision bias where there is one."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if layer.decision_bias is not None:
        layer.decision_bias.normal_()
    return layer.eval()


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize(
    "options",
    [
        *({"act_layer": name} for name in ACTIVATIONS),
        {"act_layer": torch.nn.GELU, "bias": False},
        {"act_layer": "silu", "glu": True, "num_trees": 3},
        {"base": True, "num_trees": 2},
        {"mode": "straight_through", "bias_update_rate": 0.1},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_computes_what_the_layer_does(reader, tmp_path, depth, options):
    layer = randomised(fff.FFF(7, 3, 5, depth=depth, **options))
    to_flat(layer, tmp_path / "layer.fff")
    x = torch.randn(200, 7)
    done = reader(tmp_path / "layer.fff", x.numpy().tobytes())
    assert done.returncode == 0, done.stderr
    y = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(200, 5)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    assert layer.record.load.count_nonzero() > layer.num_leaves / 2


def test_a_logit_of_0_goes_right(reader, tmp_path):
    layer = fff.FFF(1, 1, depth=1, act_layer="identity")
    for name, value in {"node_weight": [[1.0]], "node_bias": [0.0], "w_in": [[[0.0]]] * 2, "b_in": [[0.0]] * 2}.items():
        getattr(layer, name).data = torch.tensor(value)
    layer.b_out.data = torch.tensor([[-1.0], [1.0]])
    to_flat(layer, tmp_path / "layer.fff")
    done = reader(tmp_path / "layer.fff", torch.tensor([0.0, -0.0, -1e-30, 1e-30]).numpy().tobytes())
    assert torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).tolist() == [1, 1, -1, 1]


def test_what_the_reader_cannot_take_is_said(reader, tmp_path):
    file = tmp_path / "layer.fff"
    to_flat(fff.FFF(7, 3, 5, depth=2), file)
    whole, row = file.read_bytes(), bytes(4 * 7)
    damaged = {
        "cut off": [whole[:-4], whole + bytes(4), whole[:32], whole[:20] + b"\xff" * 4 + whole[24:]],
        "no file of fff": [b"", whole[:8], b"GGUF" + whole[4:]],
    }
    for message, contents in damaged.items():
        for content in contents:
            file.write_bytes(content)
            done = reader(file, row)
            assert done.returncode == 1 and message in done.stderr.decode() and not done.stdout
    file.write_bytes(whole)
    done = reader(file, row + row[:6])
    assert done.returncode == 1 and b"within a row" in done.stderr and len(done.stdout) == 4 * 5
    assert b"usage" in reader(tmp_path / "missing", row).stderr
    assert reader(file, b"").returncode == 0


@pytest.mark.parametrize(
    "make, named",
    [
        (partial(fff.FFF, depth=2, mode="gated"), "mode='gated'"),
        (partial(fff.FFF, depth=2, mode="straight_through", top_k=2), "top_k=2"),
        (partial(fff.FFF, depth=2, mode="straight_through", beam_width=2), "beam_width=2"),
        (partial(fff.FFF, depth=2, node_width=2), "node_width=2"),
        (partial(fff.FFF, depth=2, master_width=3), "master_width=3"),
        (partial(fff.FFF, depth=2, soft_eval=True), "soft_eval=True"),
        (partial(fff.FFF, depth=2, act_layer=torch.tanh), "act_layer="),
        (partial(fff.MoE, num_experts=2), "layer=MoE"),
    ],
)
def test_layers_without_a_flat_form(make, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        to_flat(make(7, 3), tmp_path / "layer.fff")
    assert not list(tmp_path.iterdir())
