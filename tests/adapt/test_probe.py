"""Blocks that have the names of a known kind: what a run on a few rows shows of them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fff
from fff.adapt import known_block, replace_feedforward

D, H = 8, 20


class Around(nn.Module):
    """The names of timm's Mlp, and what a forward may do with them."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.fc1, self.act, self.fc2, self.how = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.how(self, x)

    def inside(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "p"),
    [
        (Around(lambda m, x: m.drop(m.fc2(m.drop(m.act(m.fc1(x))))), drop=nn.Dropout(0.3)), 0.3),
        (Around(lambda m, x: m.fc2(m.drop(m.act(m.fc1(x)))), drop=nn.Dropout(0.3)), 0.0),
        (Around(lambda m, x: F.dropout(m.inside(x), m.residual, m.training), residual=0.05), 0.05),
        (Around(lambda m, x: m.inside(x)), 0.0),
    ],
    ids=["one module twice", "of hidden units", "a function", "none"],
)
def test_dropout_of_the_output_is_found_by_what_it_does(module, p, dtype):
    module.to(dtype).eval()
    assert known_block(module).dropout == pytest.approx(p, abs=0 if dtype == torch.float32 else 0.002)
    model = nn.Sequential(module)
    replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    left = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert len(left) == (p > 0) and not any(part.training for part in model.modules() if part is not model)


class DropPath(nn.Module):
    """Of whole samples, as residual paths are dropped."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1), 0.5)) / 0.5 if self.training else x


@pytest.mark.parametrize(
    "module",
    [
        Around(lambda m, x: m.drop(m.inside(x)), drop=DropPath()),
        Around(lambda m, x: m.drop(m.inside(x)), drop=nn.Dropout1d(0.5)),
        Around(lambda m, x: m.drop(m.inside(x)), drop=nn.AlphaDropout(0.5)),
        Around(lambda m, x: m.inside(m.norm(x)), norm=nn.LayerNorm(D)),
        Around(lambda m, x: m.inside(F.normalize(x, dim=-1))),
        Around(lambda m, x: x + m.inside(x)),
        Around(lambda m, x: 1.25 * m.inside(x)),
        Around(lambda m, x: (m.inside(x), x)),
        Around(lambda m, x: m.inside(x.unflatten(0, (7, -1))).flatten(0, 1)),
    ],
    ids=[
        "dropped path",
        "dropped channels",
        "alpha dropout",
        "norm",
        "norm without weights",
        "residual",
        "factor",
        "two tensors",
        "rows of another shape",
    ],
)
def test_what_does_more_around_its_maps_is_left_alone(module):
    assert known_block(module) is None
    with pytest.raises(ValueError, match=r"0 \(Around: fc1, fc2"):
        replace_feedforward(nn.Sequential(module), partial(fff.FFF, leaf_width=3, depth=1))


def test_a_look_at_a_block_leaves_no_trace():
    module = Around(lambda m, x: m.fc2(m.norm(m.drop(m.act(m.fc1(x))))), norm=nn.Identity(), drop=nn.Dropout(0.5))
    module.norm = nn.BatchNorm1d(4)  # of the four rows
    module.drop.eval()
    state, before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert known_block(module) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [part.training for part in (module, module.drop, module.norm)] == [True, False, True]
    other = Around(lambda m, x: m.inside(x))
    nn.utils.parametrizations.spectral_norm(other.fc1)
    other.eval()  # in training a look at the weight is a step
    before = {name: buffer.clone() for name, buffer in other.named_buffers()}
    known_block(other)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in other.named_buffers())
    assert not module.fc1._forward_pre_hooks and not module.fc2._forward_hooks
