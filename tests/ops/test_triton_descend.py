"""The descent by Triton kernels against the one in PyTorch, in float64.

Without a GPU the kernels run in Triton's interpreter, which shows what they compute, not whether a GPU takes them; that
is what the compilation ahead of time is for.
"""

import pytest
import torch

from fff.ops.tree_route import Nodes, dense_logits, greedy_leaf, path_logits, path_to

pytest.importorskip("triton")
from fff.ops.tree_route.triton import MANY_ROWS, MAX_LEVELS, descend, top_levels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes the bits of bfloat16 for integers.
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16")
)
DTYPES = [torch.float32, torch.float16, BFLOAT16]
NAMES = "x", "node_weight", "node_bias"
# As a share of the largest value. Logits are float32 sums of up to 600 products, all exact but in float32.
LOGIT_TOLERANCE = 1e-6
# Of gradients: sums as above; in half precision each term of a matmul is rounded once, and the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# A decision is compared where its logit is further from 0; logits are about 1.
CLEAR = 1e-4


def call_of(rows, d, depth, trees, *, dtype=torch.float32, bias=True, decision_bias=False, flip=False):
    """Arguments by name, of rows all of whose decisions are clear."""
    nodes, drawn = trees * (2**depth - 1), 2 * rows + 8
    call = {
        "x": torch.randn(drawn, d).to(dtype),
        "node_weight": (torch.randn(nodes, d) / d**0.5).to(dtype),
        "node_bias": torch.randn(nodes).to(dtype) if bias else None,
        "decision_bias": torch.randn(nodes) if decision_bias else None,
        "num_trees": trees,
        "depth": depth,
        "flip": torch.rand(drawn, trees, depth) < 0.3 if flip else None,
    }
    with torch.no_grad():
        index, logit = in_pytorch(call)
    if decision_bias:
        leaf = (index % 2**depth).unsqueeze(-1)
        node = path_to(leaf, depth).node + torch.arange(trees).view(-1, 1, 1) * (2**depth - 1)
        logit = logit + call["decision_bias"][node]
    clear = (logit.abs() > CLEAR).flatten(1).all(1).nonzero().flatten()[:rows]
    assert len(clear) == rows
    call["x"] = call["x"][clear]
    call["flip"] = call["flip"][clear] if flip else None
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def in_pytorch(call):
    """What `descend` promises, from the functions that define the route, in float64."""
    trees, depth = call["num_trees"], call["depth"]
    x, weight, bias, decision_bias = (
        None if call[name] is None else call[name].double() for name in (*NAMES, "decision_bias")
    )

    def per_tree(parameter):
        return None if parameter is None else parameter.unflatten(0, (trees, 2**depth - 1))

    nodes = Nodes(per_tree(weight), per_tree(bias))
    top = dense_logits(x, nodes, depth)
    leaf = greedy_leaf(x, nodes, depth, top, decision_bias=per_tree(decision_bias), flip=call["flip"])
    index = leaf.squeeze(2) + torch.arange(trees, device=x.device) * 2**depth
    return index, path_logits(x, nodes, path_to(leaf, depth).node, top)


def gradients(function, call, grad_logit, wanted=NAMES, **options):
    leaves = {name: call[name].detach().requires_grad_() for name in wanted if call[name] is not None}
    index, logit = function({**call, **leaves}, **options)
    found = torch.autograd.grad(logit, list(leaves.values()), grad_logit.to(logit.dtype))
    return index, logit.detach(), dict(zip(leaves, found, strict=True))


def in_triton(call, **options):
    return descend(**call, **options)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    if expected.numel():
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{error:.1e}"


def assert_descends(call, levels=None, grad_logit=None):
    if grad_logit is None:
        grad_logit = torch.randn(call["x"].shape[0], call["num_trees"], 1, call["depth"]).to(DEVICE)
    index, logit, found = gradients(in_triton, call, grad_logit, levels=levels)
    true_index, true_logit, expected = gradients(in_pytorch, call, grad_logit)
    assert index.dtype == torch.int64 and torch.equal(index, true_index)
    assert logit.dtype == torch.float32
    assert_close(logit, true_logit, LOGIT_TOLERANCE)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == call[name].dtype
        assert_close(found[name], value, TOLERANCE[call[name].dtype])
    return index, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [0, 2, None])
@pytest.mark.parametrize("trees", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"decision_bias": True}, {"flip": True}, {"decision_bias": True, "flip": True}],
    ids=lambda options: "_".join(options) or "plain",
)
def test_leaf_logits_and_gradients(options, trees, levels, dtype):
    assert_descends(call_of(7, 97, 3, trees, dtype=dtype, **options), levels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, d, depth, trees, levels",
    [
        (1, 5, 4, 2, None),  # one row
        (0, 5, 4, 2, None),  # no row
        (5, 1, 2, 1, 1),  # one number in a row
        (70, 33, 4, 2, 3),  # more rows than a tile
        (3, 1030, 3, 2, 0),  # more columns than a block of any kernel
        (3, 600, 3, 1, 2),
        (9, 6, 9, 2, None),  # deeper than gradients of weights go by matmul
        (4, 9, 1, 1, 0),
        (4, 9, 1, 3, 1),
        (6, 7, 0, 3, None),  # no node
        (0, 7, 0, 1, None),
        (6, 17, 9, 1, 7),  # deeper than the matmul goes
    ],
)
def test_sizes(rows, d, depth, trees, levels, dtype):
    assert_descends(call_of(rows, d, depth, trees, dtype=dtype), levels)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in Triton's interpreter, which runs one program after the other")
@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_sizes_of_a_network(levels, dtype):
    """Loops that are pipelined, and more programs than run at once."""
    assert_descends(call_of(8292, 768, 10, 1, dtype=dtype), levels)


def test_a_deep_walk_from_the_root():
    assert_descends(call_of(5, 17, 9, 1), 0)


@pytest.mark.parametrize("levels", [0, 2, 5])
def test_all_rows_to_one_leaf(levels):
    """More rows at each node than are summed at once, and nodes that no row visits."""
    call = call_of(1, 19, 5, 2, decision_bias=True)
    call["x"] = call["x"] * torch.linspace(1, 1.0001, 50, device=DEVICE)[:, None]
    index, found = assert_descends(call, levels)
    assert (index == index[0]).all()
    assert found["node_bias"].count_nonzero() == found["node_weight"].any(1).count_nonzero() == 2 * 5


@pytest.mark.parametrize("levels", [0, 2])
def test_a_nan_goes_left_and_harms_no_other_row(levels):
    call = call_of(3, 6, 3, 1)
    expected = descend(**call, levels=levels)
    call["x"][1, 2] = torch.nan
    index, logit = descend(**call, levels=levels)
    assert index[1].item() == 0 and logit[1].isnan().all()
    assert torch.equal(index[::2], expected[0][::2]) and torch.equal(logit[::2], expected[1][::2])
    flip = torch.zeros(3, 1, 3, dtype=torch.bool, device=DEVICE)
    flip[1, 0, 1] = True
    index, _ = descend(**{**call, "flip": flip}, levels=levels)
    assert index[1].item() == 0b010


@pytest.mark.parametrize("levels", [0, 2])
def test_a_zero_of_either_sign_goes_right(levels):
    x, weight = torch.zeros(2, 6, device=DEVICE), torch.full((7, 6), -1.0, device=DEVICE)
    minus_zero = torch.full((7,), -0.0, device=DEVICE)
    for bias, decision_bias in [(None, None), (minus_zero, None), (minus_zero, minus_zero)]:
        index, logit = descend(x, weight, bias, decision_bias, 1, 3, levels=levels)
        assert (index == 7).all() and (logit == 0).all()


@pytest.mark.parametrize("levels", [0, 2])
def test_strided_tensors(levels):
    call = call_of(7, 10, 3, 2, decision_bias=True, flip=True)
    grad_logit = torch.randn(3, 1, 2, 7, device=DEVICE).permute(3, 2, 1, 0)
    expected = gradients(in_triton, call, grad_logit.contiguous(), levels=levels)
    wide = torch.cat([call["x"]] * 2, 1)
    for x in (call["x"].T.contiguous().T, wide[:, 10:], wide[:, :10]):
        strided = {
            **call,
            "x": x,
            "node_weight": call["node_weight"].T.contiguous().T,
            "node_bias": call["node_bias"].repeat_interleave(2)[::2],
            "flip": call["flip"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        }
        found = gradients(in_triton, strided, grad_logit, levels=levels)
        assert torch.equal(found[0], expected[0])
        for name, value in expected[2].items():
            assert_close(found[2][name], value, TOLERANCE[torch.float32])


def test_rows_that_share_their_memory():
    call = call_of(1, 10, 3, 2)
    call["x"] = call["x"].expand(4, 10)
    assert_descends(call, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [0, 2, 4])
def test_each_gradient_alone(levels, dtype):
    """What is not asked for is not computed, and what is left does not depend on it."""
    call, grad_logit = call_of(20, 9, 4, 2, dtype=dtype), torch.randn(20, 2, 1, 4, device=DEVICE)
    *_, together = gradients(in_triton, call, grad_logit, levels=levels)
    for name in NAMES:
        *_, alone = gradients(in_triton, call, grad_logit, [name], levels=levels)
        assert list(alone) == [name] and torch.equal(alone[name], together[name])


@pytest.mark.parametrize("levels", [0, 2, 4])
def test_repeated_calls_have_the_same_bits(levels):
    call, grad_logit = call_of(100, 40, 4, 1), torch.randn(100, 1, 1, 4, device=DEVICE)
    index, logit, once = gradients(in_triton, call, grad_logit, levels=levels)
    for _ in range(2):
        again = gradients(in_triton, call, grad_logit, levels=levels)
        assert torch.equal(again[0], index) and torch.equal(again[1], logit)
        assert all(torch.equal(again[2][name], value) for name, value in once.items())


def test_autocast_changes_nothing():
    call, grad_logit = call_of(20, 9, 4, 2), torch.randn(20, 2, 1, 4, device=DEVICE)
    *_, expected = gradients(in_triton, call, grad_logit, levels=4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        *_, found = gradients(in_triton, call, grad_logit, levels=4)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_custom_operators():
    call = call_of(3, 5, 2, 2, decision_bias=True, flip=True)
    tensors = [
        call[name].requires_grad_() if name in NAMES else call[name] for name in (*NAMES, "decision_bias", "flip")
    ]
    torch.library.opcheck(torch.ops.fff.triton_descend.default, (*tensors, 2, 2, 1))
    index, logit = descend(**call)
    backward = logit.detach(), tensors[0].detach(), tensors[1].detach(), index, 2, 2, 1
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.fff.triton_descend_backward.default, (*backward, *need))


def test_there_is_no_second_derivative():
    call = call_of(3, 5, 2, 1)
    x = call["x"].requires_grad_()
    _, logit = descend(**call)
    (grad,) = torch.autograd.grad((logit**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="triton_descend_backward"):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    call, grad_logit = call_of(9, 8, 3, 2, flip=True), torch.randn(9, 2, 1, 3, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(in_triton, fullgraph=True, backend="aot_eager", dynamic=True)
    expected, found = (gradients(function, call, grad_logit) for function in (in_triton, compiled))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert all(torch.equal(found[2][name], value) for name, value in expected[2].items())


def test_bad_calls_are_named():
    call = call_of(3, 5, 2, 1)
    with pytest.raises(ValueError, match="float64"):
        descend(**{**call, "x": call["x"].double(), "node_weight": call["node_weight"].double()})
    with pytest.raises(ValueError, match="float16 and torch.float32"):
        descend(**{**call, "x": call["x"].half()})
    with pytest.raises(ValueError, match="depth=16"):
        descend(**{**call, "depth": 16})
    with pytest.raises(ValueError, match="levels=3"):
        descend(**call, levels=3)


@pytest.mark.parametrize("depth", range(16))
def test_levels_by_matmul(depth):
    assert top_levels(1, depth) == top_levels(MANY_ROWS - 1, depth) == 0
    levels = top_levels(MANY_ROWS, depth)
    assert levels == depth if depth <= MAX_LEVELS else 0 < levels <= MAX_LEVELS
