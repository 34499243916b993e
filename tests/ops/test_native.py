"""The native CPU operators against the formula in float64, at every size that their tiles, blocks and sorts know."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fff
from fff import FFF, MoE
from fff.build import build
from fff.ops.activation import ACTIVATIONS
from fff.ops.expert_mlp import Problem, choose_backend, cpu, expert_mlp, resolve_backend
from fff.ops.tree_route import dense_logits, greedy_leaf, path_logits, path_to

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(not cpu.available(), reason="the native operators are not built: python -m fff.build")
# Sums of n float32 terms are off by about sqrt(n) * 6e-8 of their size; n is below 3000 here, values are about 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# The sums are in float32; rows, weights and result are bfloat16, which rounds to 2^-9.
BFLOAT16 = {"rtol": 2**-8, "atol": 1e-4}


def weights(d, experts, width, out, *, glu=False, bias=True, dtype=torch.float32):
    rows = width * (2 if glu else 1)
    w_in, w_out = torch.randn(experts, rows, d) / d**0.5, torch.randn(experts, width, out) / width**0.5
    b_in, b_out = (torch.randn(experts, rows), torch.randn(experts, out)) if bias else (None, None)
    return [None if t is None else t.to(dtype) for t in (w_in, b_in, w_out, b_out)]


def double(t):
    return None if t is None else t.double()


def assert_native(x, index, gate, tensors, *, tolerance=FLOAT32, **options):
    with torch.no_grad():
        y = expert_mlp(x, index, gate, *tensors, backend="native", **options)
    assert y.dtype == x.dtype
    expected = expert_mlp(
        *map(double, (x,)), index, double(gate), *map(double, tensors), backend="reference", **options
    )
    torch.testing.assert_close(y.double(), expected, **tolerance)
    return y


@built
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("glu, bias, gated", [(False, True, False), (True, True, True), (False, False, True)])
@pytest.mark.parametrize(
    "rows, d, experts, width, out, choices",
    [
        (7, 97, 5, 3, 11, 1),  # odd sizes, all below a register but D
        (40, 33, 3, 33, 49, 2),  # one number more than whole registers
        (0, 4, 6, 2, 3, 2),  # no row
        (1, 4, 6, 2, 3, 2),  # one row
        (9, 5, 3, 1, 1, 3),  # one unit, one output, all experts
        (200, 16, 1, 4, 400, 1),  # one expert: several groups of 64 rows, a row of tiles of outputs
        (5, 2500, 2, 4, 3, 1),  # D in several blocks, the last one odd
        (70, 1100, 2, 130, 5, 1),  # units in several blocks
        (300, 3, 300, 2, 2, 1),  # expert numbers of two radix digits
        (60, 3, 70_000, 1, 2, 1),  # of three
    ],
)
def test_native_equals_formula(rows, d, experts, width, out, choices, glu, bias, gated, dtype, tolerance):
    tensors = weights(d, experts, width, out, glu=glu, bias=bias, dtype=dtype)
    x, index = torch.randn(rows, d, dtype=dtype), torch.randint(experts, (rows, choices))
    gate = torch.rand(rows, choices, dtype=dtype) if gated else None
    assert_native(x, index, gate, tensors, glu=glu, tolerance=tolerance)


@built
@pytest.mark.parametrize("size", [*range(1, 18), 63, 64, 65, 130])
def test_groups_of_every_size(size):
    # The second expert has the remaining rows, the third none.
    index = torch.cat([torch.zeros(size), torch.ones(20)])[torch.randperm(size + 20)].long()
    assert_native(torch.randn(size + 20, 40), index.unsqueeze(1), None, weights(40, 3, 9, 21))


@built
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(name):
    assert_native(3 * torch.randn(30, 8), torch.randint(4, (30, 1)), None, weights(8, 4, 19, 5), activation=name)


@built
@pytest.mark.parametrize("choices", [1, 2])
def test_left_out_and_repeated_choices(choices):
    index = torch.randint(-1, 3, (50, choices))  # rows without any expert, and rows with one expert twice
    assert_native(torch.randn(50, 8), index, torch.rand(50, choices), weights(8, 3, 4, 5))


@built
def test_no_choice_at_all_gives_zeros():
    index = torch.empty(20, 0, dtype=torch.int64)
    assert not assert_native(torch.randn(20, 8), index, None, weights(8, 3, 4, 5)).any()


@built
def test_any_integers_are_an_index():
    x, index, tensors = torch.randn(20, 8), torch.randint(3, (20, 1)), weights(8, 3, 4, 5)
    y = torch.ops.fff.native_expert_mlp(x, index.int(), None, *tensors, "relu", False)
    assert torch.equal(y, expert_mlp(x, index, None, *tensors, backend="native"))


@built
def test_strided_tensors():
    w_in, b_in, w_out, b_out = weights(6, 4, 3, 5)
    w_in, w_out = w_in.mT.contiguous().mT, w_out.mT.contiguous().mT
    x, index = torch.randn(6, 22).T, torch.randint(4, (3, 22)).T
    assert_native(x, index, torch.rand(3, 22).T, [w_in, b_in, w_out, b_out])


@built
@pytest.mark.parametrize("choices, gated", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, out", [(33, 50), (1, 400), (32, 10)])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(choices, gated, dtype, width, out):
    tensors = weights(97, 5, width, out, dtype=dtype)
    x, index = torch.randn(600, 97, dtype=dtype), torch.rand(600, 5).argsort(1)[:, :choices]
    gate = torch.rand(600, choices, dtype=dtype) if gated else None

    def run(rows):
        return expert_mlp(x[rows], index[rows], None if gate is None else gate[rows], *tensors, backend="native")

    together = run(torch.arange(600))
    order = torch.randperm(600)
    assert torch.equal(run(order), together[order])
    for row in range(0, 600, 25):
        assert torch.equal(run(torch.tensor([row])), together[row : row + 1])
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(torch.arange(600)), together)
    finally:
        torch.set_num_threads(1)


def tree(depth, *, trees=1, d=13, dtype=torch.float32):
    layer = FFF(d, 3, 5, depth=depth, num_trees=trees, mode="straight_through", bias_update_rate=0.1).eval()
    nn.init.normal_(layer.decision_bias) if depth else None
    return layer.to(dtype).requires_grad_(False)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth, trees", [(0, 1), (1, 1), (1, 3), (6, 2), (9, 1), (15, 1)])
def test_descent_is_the_greedy_one(depth, trees, dtype):
    layer = tree(depth, trees=trees, dtype=dtype)
    x = torch.randn(75, 13, dtype=dtype)
    layer(x)
    assert layer.record.backend == "native"
    wide = tree(depth, trees=trees).double()
    wide.load_state_dict(layer.state_dict())
    nodes, rows = wide._nodes(), x.double()
    bias = wide.decision_bias.view(trees, -1)
    leaf = greedy_leaf(rows, nodes, depth, dense_logits(rows, nodes, min(depth, 7)), decision_bias=bias)
    torch.testing.assert_close(layer.record.index, wide._expert_index(leaf))
    logit = path_logits(rows, nodes, path_to(leaf, depth).node, dense_logits(rows, nodes, min(depth, 7)))
    torch.testing.assert_close(layer.record.tree.visited.double(), logit, **FLOAT32)  # without the decision bias


@built
def test_ties_go_right_and_nan_goes_left():
    layer = FFF(4, 2, depth=3).eval().requires_grad_(False)
    nn.init.zeros_(layer.node_bias)
    x = torch.randn(6, 4)
    x[0] = 0.0
    x[1] = torch.nan
    y = layer(x)
    assert layer.record.index[0] == 7 and layer.record.index[1] == 0
    layer.backend = "grouped"
    torch.testing.assert_close(y, layer(x), equal_nan=True, **FLOAT32)
    torch.testing.assert_close(y[1], torch.full((4,), torch.nan), equal_nan=True)


LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "glu": {"glu": True, "act_layer": "silu"},
    "gelu module": {"act_layer": nn.GELU},
    "approximate gelu module": {"act_layer": nn.GELU("tanh")},
    "three trees": {"num_trees": 3},
    "master leaf": {"master_width": 2},
    "temperature": {"temperature": 3.0},
    "straight-through": {"mode": "straight_through"},
    # Their descent stays in PyTorch.
    "two leaves": {"top_k": 2},
    "gated": {"mode": "gated"},
    "wide nodes": {"node_width": 2},
}


@built
@pytest.mark.parametrize("options", LAYERS.values(), ids=list(LAYERS))
def test_layer_equals_its_pytorch_path(options):
    layer = FFF(11, 3, 7, depth=4, **options).eval()
    other = FFF(11, 3, 7, depth=4, backend="grouped", **options).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x), **FLOAT32)
    assert (layer.record.backend, other.record.backend) == ("native", "grouped")
    assert torch.equal(layer.record.index, other.record.index) and torch.equal(layer.record.load, other.record.load)


@built
def test_node_entropy_counts_visiting_rows_unless_traced():
    layer = FFF(5, 2, depth=2).eval()
    x = torch.randn(40, 5)
    with torch.no_grad():
        layer(x)
        native = layer.record.node_entropy
        logit = x @ layer.node_weight.T + layer.node_bias
        entropy = torch.distributions.Bernoulli(logits=logit).entropy()
        right = logit[:, 0] >= 0
        by_hand = torch.stack([entropy[:, 0].mean(), entropy[~right, 1].mean(), entropy[right, 2].mean()])
        torch.testing.assert_close(native, by_hand, rtol=1e-4, atol=1e-5)
        with fff.node_tracing(layer):
            layer(x)
        torch.testing.assert_close(layer.record.node_entropy, entropy.mean(0), rtol=1e-4, atol=1e-5)
        assert not layer.trace_nodes


@built
def test_nodes_of_a_wider_type_than_the_leaves():
    """As a router kept in float32 has; the fused call would need one type."""
    layer = FFF(16, 4, 8, depth=3, mode="straight_through").bfloat16()
    for name in ("node_weight", "node_bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).float()))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    expected = layer.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-8)  # hidden units are rounded elsewhere


@built
def test_mixture_of_experts_takes_it():
    layer = MoE(6, 4, num_experts=5, top_k=2, router="mixtral").eval()
    x = torch.randn(30, 6)
    with torch.no_grad():
        y = layer(x)
        assert layer.record.backend == "native"
        layer.backend = "reference"
        torch.testing.assert_close(y, layer(x), **FLOAT32)


@built
def test_auto_takes_it_where_it_may():
    layer = FFF(6, 2, depth=2).eval()
    x = torch.randn(3, 6)

    def backend(layer, x=x):
        layer(x)
        return layer.record.backend

    assert backend(layer) == "native"
    with torch.no_grad():
        assert backend(layer) == "native"
        assert backend(FFF(6, 2, depth=2, act_layer=torch.tanh).eval()) != "native"
        assert backend(FFF(6, 2, depth=2, drop=0.5, mode="straight_through")) != "native"
        assert backend(FFF(6, 2, depth=2, drop=0.5).eval()) == "native"
        assert backend(FFF(6, 2, depth=2).eval().double(), x.double()) != "native"
    with torch.inference_mode():
        assert backend(layer) == "native"
    layer.requires_grad_(False)
    assert backend(layer) == "native"
    nn.utils.parametrize.register_parametrization(layer, "w_in", nn.Identity())
    assert backend(layer) == "native"


def test_resolution_is_a_pure_function():
    hard, soft = Problem(8, 4, 4, 2, 4, 1), Problem(8, 4, 4, 2, 4, None)
    assert resolve_backend("auto", hard, native=True) == "native"
    assert resolve_backend("auto", hard, native=True, compiling=True) == "native"
    assert resolve_backend("auto", hard, native=True, exporting=True) == "gather"
    assert resolve_backend("auto", soft, native=True) == "dense"
    assert resolve_backend("grouped", hard, native=True) == "grouped"
    with pytest.raises(ValueError, match="native"):
        resolve_backend("native", soft, native=True)


@built
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda call: call.update(dropout=0.5), "dropout"),
        (lambda call: call.update(activation=torch.tanh), "name"),
        (lambda call: call.update(w_in=call["w_in"].double()), "float64"),
    ],
)
def test_what_it_cannot_take_is_said(change, message):
    names = ("w_in", "b_in", "w_out", "b_out")
    call = dict(zip(names, weights(3, 2, 2, 2), strict=True))
    call |= {"x": torch.randn(4, 3), "index": torch.zeros(4, 1, dtype=torch.int64), "gate": None}
    change(call)
    with pytest.raises(ValueError, match=f"backend='native'.*{message}"):
        choose_backend("native", **call)


@built
@pytest.mark.parametrize(
    "change, error",
    [
        ({"index": torch.tensor([[2], [0]])}, IndexError),
        ({"index": torch.tensor([[-2], [0]])}, IndexError),
        ({"index": torch.tensor([[0.0], [0.0]])}, ValueError),
        ({"index": torch.tensor([[0]])}, ValueError),
        ({"gate": torch.ones(2, 2)}, ValueError),
        ({"x": torch.randn(2, 4)}, ValueError),
        ({"x": torch.randn(2, 3).bfloat16()}, TypeError),
        ({"b_in": torch.randn(2, 3)}, ValueError),
        ({"w_out": torch.randn(3, 2, 2)}, ValueError),
        ({"activation": "tanh"}, ValueError),
    ],
)
def test_wrong_arguments_raise(change, error):
    w_in, b_in, w_out, b_out = weights(3, 2, 2, 2)
    call = {"x": torch.randn(2, 3), "index": torch.zeros(2, 1, dtype=torch.int64), "gate": None, "w_in": w_in}
    call |= {"b_in": b_in, "w_out": w_out, "b_out": b_out, "activation": "relu", "glu": False} | change
    with pytest.raises(error):
        torch.ops.fff.native_expert_mlp.default(**call)


@built
def test_autocast_keeps_the_weights_and_casts_the_result():
    layer = FFF(6, 2, depth=2).eval()
    x = torch.randn(9, 6)
    with torch.no_grad():
        expected = layer(x).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert layer.record.backend == "native"
            choice = expert_mlp(x, layer.record.index, None, layer.w_in, layer.b_in, layer.w_out, layer.b_out)
    assert torch.equal(y, expected) and torch.equal(choice, expected)


@built
def test_operators_are_well_registered_and_compile():
    w_in, b_in, w_out, b_out = weights(3, 4, 2, 2)
    x, index = torch.randn(5, 3), torch.randint(4, (5, 1))
    # No autograd formula: the operators are never called where a gradient is recorded.
    tests = ("test_schema", "test_faketensor")
    call = (x, index, None, w_in, b_in, w_out, b_out, "relu", False)
    torch.library.opcheck(torch.ops.fff.native_expert_mlp.default, call, test_utils=tests)
    call = (x, torch.randn(3, 3), None, None, 1, 2, w_in, b_in, w_out, b_out, "relu", False)
    torch.library.opcheck(torch.ops.fff.native_tree_mlp.default, call, test_utils=tests)
    layer = FFF(6, 2, depth=2).eval()
    rows = torch.randn(5, 6)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rows), layer(rows))
    assert layer.record.backend == "native"


def python(code, cache):
    environment = {"XDG_CACHE_HOME": str(cache), "PATH": "/nonexistent", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_without_the_library_pytorch_serves(tmp_path):
    code = (
        "import torch, fff; layer = fff.FFF(4, 2, depth=2).eval().requires_grad_(False); layer(torch.randn(3, 4)); "
        "print(layer.record.backend); layer.backend = 'native'; layer(torch.randn(3, 4))"
    )
    result = python(code, tmp_path)
    assert result.stdout.strip() in ("gather", "grouped", "dense")
    assert result.stderr.strip().endswith("it is not built; run: python -m fff.build")


def test_a_spoilt_library_is_left_aside_with_a_warning(tmp_path):
    code = (
        "from fff.ops.expert_mlp import cpu; path = cpu.library_path(); path.parent.mkdir(parents=True); "
        "path.write_text('spoilt'); print(cpu._load())"
    )
    result = python(code, tmp_path)
    assert result.stdout.strip().startswith("it cannot be loaded (") and "backends serve instead" in result.stderr


def test_a_spoilt_library_is_built_again(tmp_path, monkeypatch):
    path = tmp_path / "native.so"
    path.write_text("spoilt")
    monkeypatch.setattr(cpu, "library_path", lambda: path)
    made = []

    def compiled(*, build_directory, **_):
        Path(build_directory, "fff_native.so").write_text("compiled")
        made.append(build_directory)

    monkeypatch.setattr("torch.utils.cpp_extension.load", compiled)
    monkeypatch.setattr(cpu, "_missing", "it cannot be loaded (it is spoilt)")
    assert build() == build() == path
    assert path.read_text() == "compiled" and len(made) == 1, "a library must not be loaded twice"


def test_a_library_is_built_once(tmp_path, monkeypatch):
    path = tmp_path / "native.so"
    path.write_text("by another process")
    monkeypatch.setattr(cpu, "library_path", lambda: path)
    # A compilation would load the result, and two libraries with the same operators end the process.
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **_: pytest.fail("built again"))
    for missing in ("", "it is not built"):
        monkeypatch.setattr(cpu, "_missing", missing)
        assert build() == path and path.read_text() == "by another process"


def test_a_failed_build_says_why_and_names_the_fallback(tmp_path):
    code = "import sys; from fff import build; sys.exit(build.main())"  # no compiler in the PATH
    result = python(code, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("falls back to the PyTorch backends (dense, grouped, gather)")
    assert len(result.stderr.strip().splitlines()) > 1
    assert not list(tmp_path.rglob("*.so")) and not [p for p in (tmp_path / "fff").iterdir()]
