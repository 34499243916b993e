"""Blocks become trees on what reaches them, and learn from the blocks without touching anything else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fff
from fff.adapt import convert_feedforward, distillation, from_dense, relative_error

D, H = 6, 16


class Mlp(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop2 = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout(p)

    def forward(self, x):
        return self.drop2(self.fc2(self.act(self.fc1(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def encoder():
    layer = nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(D, D), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def gated():
    return nn.Sequential(nn.Linear(D, D), Gated(), Gated())


def pair(build=gated, **options):
    """(student, teacher, rows)"""
    teacher, x = build(), torch.randn(9, 8, D)
    student = copy.deepcopy(teacher)
    convert_feedforward(student, lambda: student(x), **{"depth": 2, "hardening_weight": 0.5, **options})
    return student, teacher, x


@pytest.mark.parametrize("build", [encoder, gated])
def test_exact_trees_give_the_same_model_and_no_error(build):
    """Of depth 2, each leaf with all units."""
    student, teacher, x = pair(build, leaf_width=H)
    torch.testing.assert_close(student(x), teacher(x), rtol=1e-4, atol=1e-5)
    with distillation(student, teacher) as distance:
        student(x)
        assert distance().item() < 1e-9


def test_what_reaches_a_block_is_its_calibration():
    """In evaluation; the second block gets what the first one gave before it was replaced."""
    teacher = nn.Sequential(nn.Dropout(0.5), Gated(), Gated())
    student, rows = copy.deepcopy(teacher).train(), torch.randn(2, 40, D)
    student[2].eval()
    found = convert_feedforward(student, lambda: [student(x) for x in rows], depth=2)
    assert list(found) == ["1", "2"] and [student[i] for i in (1, 2)] == [each.layer for each in found.values()]
    assert [module.training for module in student] == [True, True, False]
    block = teacher[2]
    first, act, last = (block.gate_proj, block.up_proj), F.silu, block.down_proj
    expected = from_dense(first, act, last, depth=2, calibration=teacher[1](rows))
    assert found["2"].error == pytest.approx(expected.error, rel=1e-5)
    torch.testing.assert_close(student[2].w_in, expected.layer.w_in)
    assert not block.gate_proj._forward_pre_hooks and not student[2].training


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_that_torch_takes_out_is_no_calibration():
    teacher = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(9, 8, D), torch.arange(8).expand(9, 8) >= 5
    student, other = copy.deepcopy(teacher), copy.deepcopy(teacher)
    found = convert_feedforward(student, lambda: student(x, src_key_padding_mask=padding), depth=2)
    expected = convert_feedforward(other, lambda: other(x[:, :5]), depth=2)
    for name, conversion in found.items():
        assert conversion.error == pytest.approx(expected[name].error, rel=1e-4)


def test_a_block_that_is_not_reached_is_named():
    model = gated()
    before = model[1]
    with pytest.raises(ValueError, match=r"not reached the blocks \['2'\]"):
        convert_feedforward(model, lambda: model[:2](torch.randn(5, D)), depth=1)
    assert model[1] is before and not before.gate_proj._forward_pre_hooks


class LowRank(nn.Linear):
    """Adds to what its weight gives."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class Clamped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=5.0)) * self.up_proj(x))


class ValueFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, 2 * H), nn.SiLU(), nn.Linear(H, D)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(gate) * value)


def adapted():
    mlp = Mlp()
    mlp.fc2 = LowRank(H, D)
    return mlp


def nameless():
    mlp = Mlp()
    mlp.forward, mlp.act = lambda x: mlp.drop2(mlp.fc2(torch.tanh(mlp.fc1(x)))), None
    return mlp


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Clamped, r"block '1' \(Clamped\) computes something else"),
        (ValueFirst, r"block '1' \(ValueFirst\) computes something else"),
        (adapted, "LowRank computes something else than its weight"),
        (nameless, r"block '1' \(Mlp\): no activation under a usual name; pass match="),
    ],
)
def test_a_block_that_computes_something_else_is_not_converted(build, message):
    model, x = nn.Sequential(Mlp(), build()), torch.randn(9, D)
    before = list(model)
    with pytest.raises(ValueError, match=message):
        convert_feedforward(model, lambda: model(x), depth=0)
    assert list(model) == before
    if build is not adapted:  # whose maps the teacher itself calls
        student = nn.Sequential(fff.FFF(D, 3, depth=1), fff.FFF(D, 3, depth=1))
        with pytest.raises(ValueError, match=message), distillation(student, model):
            pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_is_no_other_formula(dtype):
    model, x = gated().to(dtype), torch.randn(9, D, dtype=dtype)
    convert_feedforward(model, lambda: model(x), depth=0)


def test_the_distance_is_the_mean_squared_error_of_the_conversion():
    student, teacher, x = pair()
    with distillation(student, teacher) as distance:
        student(x)
        found = distance().item()
    hidden, errors = student[0](x), []
    for layer, block in zip(student[1:], teacher[1:], strict=True):
        errors.append(relative_error(layer, (block.gate_proj, block.up_proj), F.silu, block.down_proj, hidden))
        hidden = layer(hidden)
    assert errors[0] > 0.1
    assert found == pytest.approx(sum(error**2 for error in errors) / 2, rel=1e-4)


@pytest.mark.parametrize("build", [encoder, gated])
def test_an_error_trains_its_layer_alone(build):
    student, teacher, x = pair(build)
    with distillation(student, teacher) as distance:
        student(x)
        distance().backward()
    trees = {p for module in student.modules() if isinstance(module, fff.FFF) for p in module.parameters()}
    assert trees and all((p.grad is not None) == (p in trees) for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    fff.aux_loss(student).backward()
    assert student[0].weight.grad.any(), "the record is not that of the forward, whose input has a gradient"


def test_dropout_around_a_layer_is_no_error():
    teacher = nn.Sequential(nn.Linear(D, D), Mlp(p=0.5))
    student, x = copy.deepcopy(teacher), torch.randn(40, D)
    convert_feedforward(student, lambda: student(x), depth=1, leaf_width=H)
    with distillation(student, teacher) as distance:
        student(x)
        assert distance().item() < 1e-9


def test_nothing_is_compared_without_gradients_or_after_the_context():
    student, teacher, x = pair()
    with distillation(student, teacher) as distance:
        student(x)
        distance()
        with torch.no_grad():
            student(x)
        with pytest.raises(ValueError, match="no layer has run"):
            distance()
    student(x)
    with pytest.raises(ValueError, match="no layer has run"):
        distance()


def test_a_student_without_trees_is_refused():
    with pytest.raises(ValueError, match="student=Sequential has no routed layer"), distillation(gated(), gated()):
        pass


def test_blocks_that_stayed_dense_are_left_out():
    teacher, x = gated(), torch.randn(20, D)
    student = copy.deepcopy(teacher)
    student[2] = from_dense(
        (teacher[2].gate_proj, teacher[2].up_proj), "silu", teacher[2].down_proj, depth=1, leaf_width=H, calibration=x
    ).layer
    with distillation(student, teacher) as distance:
        student(x)
        assert distance().item() < 1e-9
