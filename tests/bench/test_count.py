"""Operations and bytes of calls whose counts are known by hand."""

import pytest
import torch
from torch import nn

import fff
from fff.bench.count import count_flops, peak_bytes
from fff.ops.expert_mlp import cpu, expert_mlp

MIB = 2**20
# torch allocates a few bytes for the scalars of an operation.
SLACK = 4096


def test_peak_is_what_is_held_at_once():
    def call():
        first = torch.empty(MIB, dtype=torch.uint8)
        second = first.clone()
        del first, second
        third = torch.empty(MIB, dtype=torch.uint8)
        del third

    assert 0 <= peak_bytes(call) - 2 * MIB < SLACK


def test_memory_held_before_the_call_does_not_count():
    held = torch.empty(4 * MIB, dtype=torch.uint8)
    assert 0 <= peak_bytes(lambda: held[:MIB].clone()) - MIB < SLACK


def test_saved_activations_and_gradients_count():
    linear = nn.Linear(256, 512, bias=False)
    x = torch.randn(1024, 256)

    def call():
        linear(x).square().sum().backward()
        linear.zero_grad(set_to_none=True)

    output, weight = 1024 * 512 * 4, 256 * 512 * 4
    # output, its square; later output, its gradient, the weight's gradient, and one product on the way
    assert 2 * output + weight <= peak_bytes(call) <= 4 * output + weight + SLACK


def test_flops_of_a_linear_layer():
    linear = nn.Linear(7, 11)
    x = torch.randn(5, 7)
    with torch.no_grad():
        assert count_flops(lambda: linear(x)) == 2 * 5 * 7 * 11
    # backward: the weight's gradient alone, for x needs none
    assert count_flops(lambda: linear(x).sum().backward()) == 2 * 2 * 5 * 7 * 11


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("backend", ["reference", "gather", "grouped", "native", "triton"])
def test_flops_of_chosen_experts(backend, glu):
    if backend == "native" and not cpu.available():
        pytest.skip("the native operators are not built")
    if backend == "triton":
        pytest.importorskip("triton")
    rows, choices, d, width, out = 9, 2, 7, 3, 5
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x, index = torch.randn(rows, d, device=device), torch.rand(rows, 4, device=device).argsort(1)[:, :choices]
    hidden = width * (2 if glu else 1)
    shapes = (4, hidden, d), (4, hidden), (4, width, out), (4, out)
    weights = [torch.randn(shape, device=device) for shape in shapes]

    def call(*tensors):
        return expert_mlp(x, index, None, *tensors, backend=backend, glu=glu)

    w_in, w_out = 2 * rows * choices * d * hidden, 2 * rows * choices * width * out
    assert count_flops(lambda: call(*weights)) == w_in + w_out
    trained = [weight.requires_grad_() for weight in weights]
    if backend in ("grouped", "native", "triton"):
        # The gradients of both weights and of hidden units; native computes the hidden units again.
        again = w_in if backend == "native" else 0
        assert count_flops(lambda: call(*trained).sum().backward()) == 2 * w_in + 3 * w_out + again


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_flops_of_a_tree(backend):
    if backend == "native" and not cpu.available():
        pytest.skip("the native operators are not built")
    if backend == "triton":
        pytest.importorskip("triton")
    rows, d, width, out, depth, trees = 9, 7, 3, 5, 3, 2
    options = {"mode": "straight_through", "backend": backend}
    layer = fff.FFF(d, width, out, depth=depth, num_trees=trees, **options).eval()
    if backend == "triton" and torch.cuda.is_available():
        layer = layer.cuda()
    x = torch.randn(rows, d, device=layer.w_in.device)
    nodes, w_in, w_out = (2 * rows * trees * n for n in (depth * d, d * width, width * out))
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == nodes + w_in + w_out == rows * layer.size.flops_per_row
    assert layer.record.backend == backend
    # In training with their gradients, but no gradient of x; what balances and weighs paths are no matrix products. The
    # native operator computes hidden units again.
    again = w_in if backend == "native" else 0
    assert count_flops(lambda: layer.train()(x).sum().backward()) == 2 * nodes + 2 * w_in + 3 * w_out + again


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_flops_of_the_grouped_product():
    x, weight = torch.randn(12, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    offset = torch.tensor([4, 8, 12], dtype=torch.int32)
    assert count_flops(lambda: torch._grouped_mm(x, weight, offs=offset)) == 2 * 12 * 8 * 16
