"""Operations and bytes of calls whose counts are known by hand."""

import torch
from torch import nn

from fff.bench.count import count_flops, peak_bytes

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
