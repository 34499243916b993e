"""A dense feedforward layer turned into a tree whose leaves are some of its hidden units.

T rows of a calibration sample, D input width, H hidden width, O output width, L leaf width, d depth, G = 2 where hidden
units are gated, else 1.

    y(x) = sum over j of  a_j(x) v_j + b        a_j hidden unit j, v_j (O,) its column of the second map

A leaf keeps the units S and replaces the others by their mean over the rows that reach it:

    leaf(x) = sum over j in S of  a_j(x) v_j  +  b + sum over j not in S of  mean(a_j) v_j

Units, hidden values and the first map are those of the dense layer; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fff.adapt.blocks import linear_weights
from fff.adapt.probe import on_meta, probe_rows
from fff.layers.check import check_choice, check_depth
from fff.layers.fff import FFF, MAX_DEPTH
from fff.ops.activation import Activation, resolve_activation
from fff.ops.expert_mlp.hidden import hidden_units

Method = Literal["inputs", "units"]
_MOST_STEPS = 50  # of two-means; it settles in a few


class Conversion(NamedTuple):
    """layer: the tree.

    error: its relative error in evaluation on the calibration rows, |y_tree - y_dense| / |y_dense - mean y_dense| in
        Frobenius norms: 0 is exact, 1 no better than one constant output. None without calibration rows. The leaves'
        constants were fitted to these rows, so rows held out say more: see `relative_error`.
    """

    layer: FFF
    error: float | None


class _Dense(NamedTuple):
    """w_in (G, H, D), b_in (G, H), w_out (H, O), b_out (O,)."""

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor


class _Node(NamedTuple):
    """A node of the tree that is being built: the calibration rows that reach it, and the units left to its leaves."""

    rows: Tensor
    units: Tensor


class _Split(NamedTuple):
    """weight (D,), bias (): right where weight x + bias >= 0.  units: those of the left and of the right child."""

    weight: Tensor
    bias: Tensor
    units: tuple[Tensor, Tensor]


@torch.no_grad()
def from_dense(
    linear1: nn.Module | Sequence[nn.Module],
    activation: Activation,
    linear2: nn.Module,
    *,
    depth: int = 0,
    method: Method = "inputs",
    leaf_width: int | None = None,
    calibration: Tensor | None = None,
    **options: Any,
) -> Conversion:
    """The tree of `depth` whose leaves hold hidden units of the dense layer linear2(activation(linear1(x))).

    linear1: a linear map D -> H, or the maps of gate and value of a gated layer: act(gate(x)) * value(x); one map
        D -> 2 H is taken for both, gate first. `Block.first`, `.activation` and `.last` fit the three arguments.
    depth: 0 gives the dense layer itself, exactly.
    method: how the tree is made. In both, a node halves its rows or its units by two-means with two equal halves.
        "inputs" clusters the rows. For given means the best equal halves are cut by a hyperplane across the line
        through the means, and that is the node. A leaf takes the units whose contribution varies most among its rows,
        var(a_j) |v_j|^2; leaves may share units, each has its own copy.
        "units" clusters the units by the direction of their input weights; each belongs to one leaf, of width H / 2^d.
        The node is the affine least-squares fit of how much more the right half contributes to a row than the left
        half, sum of a_j^2 |v_j|^2. (After MoEfication, Zhang et al. 2022,
        arXiv 2110.01786, which clusters units likewise and trains a flat router.)
    leaf_width: L of "inputs", 1 .. H; default H / 2^d, rounded down, at least 1. L = H is exact at any depth.
    calibration: (..., D) inputs as the layer sees them in its model, for which a forward hook on linear1 may look; at
        least 2^d rows, needed where depth > 0. Means and variances of the units of a leaf come from its rows alone.
    options: further arguments of `fff.FFF`; mode defaults to "straight_through", whose training begins at what
        evaluation computes. On the rows of each node its logit has unit variance.

    The layer has the device, type and training mode of linear2.

    ValueError for widths that do not fit, a depth or width out of range, too few rows, or a linear map that does more
    than its weight and bias tell, such as one with a low-rank adapter.
    """
    dense, gated, has_bias = _read(linear1, linear2)
    width = dense.w_out.shape[0]
    check_depth(depth, MAX_DEPTH)
    check_choice("method", method, get_args(Method))
    beyond = sorted({"num_trees", "node_width", "master_width", "base"} & set(options))
    if beyond:
        raise ValueError(
            f"options={beyond}: the layer that is made has one tree of hyperplanes and leaves of their own"
        )
    leaf_width = _leaf_width(leaf_width, width, depth, method)
    layer = FFF(
        dense.w_in.shape[2],
        leaf_width,
        dense.w_out.shape[1],
        depth=depth,
        act_layer=resolve_activation(activation),
        glu=gated,
        bias=has_bias or depth > 0,
        **{"mode": "straight_through", **options},
    )
    layer.to(device=dense.w_in.device, dtype=linear2.weight.dtype)
    x = None if calibration is None else _rows(calibration, dense)
    every = torch.arange(width, device=dense.w_in.device)
    if depth == 0:
        _fill(layer, 0, dense, every, None)
    else:
        if x is None or x.shape[0] < 2**depth:
            given = None if x is None else tuple(calibration.shape)
            raise ValueError(f"calibration={given} must have at least 2^depth={2**depth} rows of inputs")
        hidden = _hidden(dense, activation, x)
        nodes = [_Node(torch.arange(x.shape[0], device=x.device), every)]
        for level in range(depth):
            nodes = _grow(layer, 2**level - 1, nodes, dense, x, hidden, method)
        for leaf, node in enumerate(nodes):
            values = hidden[node.rows]
            units = node.units
            if method == "inputs":
                importance = values.var(0, correction=0) * dense.w_out.square().sum(1)
                units = importance.topk(leaf_width).indices.sort().values
            _fill(layer, leaf, dense, units, values.mean(0))
    error = None if x is None else _error(layer, dense, activation, x)
    return Conversion(layer.train(linear2.training), error)


@torch.no_grad()
def relative_error(
    layer: nn.Module, linear1: nn.Module | Sequence[nn.Module], activation: Activation, linear2: nn.Module, x: Tensor
) -> float:
    """The error of `Conversion`, of any layer in evaluation, on any rows (..., D)."""
    dense, _, _ = _read(linear1, linear2)
    return _error(layer, dense, activation, _rows(x, dense))


def _rows(x: Tensor, dense: _Dense) -> Tensor:
    in_features = dense.w_in.shape[2]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"inputs have shape {tuple(x.shape)}, but the layer takes {in_features} features")
    return x.detach().reshape(-1, in_features).to(dense.w_in)


def _read(linear1: nn.Module | Sequence[nn.Module], linear2: nn.Module) -> tuple[_Dense, bool, bool]:
    """The weights, whether they are gated, and whether there is any bias; in float32 at least."""
    parts = [linear1] if isinstance(linear1, nn.Module) else list(linear1)
    first = [linear_weights(part) for part in parts]
    out, b_out = linear_weights(linear2)
    for part, (weight, bias) in zip([*parts, linear2], [*first, (out, b_out)], strict=True):
        _check_linear(part, weight, bias)
    dtype = torch.promote_types(out.dtype, torch.float32)
    w_in = torch.cat([weight for weight, _ in first]).to(dtype)
    b_in = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in first]).to(dtype)
    groups, left_over = divmod(w_in.shape[0], out.shape[1])
    if left_over or groups not in (1, 2):
        raise ValueError(
            f"linear1 gives {w_in.shape[0]} features, but linear2 takes {out.shape[1]} (gated: half of them)"
        )
    has_bias = b_out is not None or any(bias is not None for _, bias in first)
    b_out = out.new_zeros(out.shape[0]) if b_out is None else b_out
    dense = _Dense(w_in.unflatten(0, (groups, -1)), b_in.view(groups, -1), out.T.to(dtype), b_out.to(dtype))
    return dense, groups == 2, has_bias


def _check_linear(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Subclasses of `nn.Linear` may add to what their weight gives."""
    if on_meta(module):
        return
    x = probe_rows(weight.shape[1], weight)
    found, expected = module(x).double(), nn.functional.linear(x, weight, bias).double()
    if (found - expected).norm() > torch.finfo(x.dtype).eps ** 0.5 * expected.norm():
        raise ValueError(f"{type(module).__name__} computes something else than its weight and bias tell (an adapter?)")


def _leaf_width(leaf_width: int | None, width: int, depth: int, method: Method) -> int:
    share, left_over = divmod(width, 2**depth)
    if method == "units" and depth > 0:
        if left_over:
            raise ValueError(
                f"depth={depth}: method='units' cannot give {width} hidden units to {2**depth} equal leaves"
            )
        if leaf_width not in (None, share):
            raise ValueError(f"leaf_width={leaf_width}: with method='units' every leaf has {share} units")
        return share
    if leaf_width is None:
        return max(share, 1)
    if depth == 0 and leaf_width != width or not 1 <= leaf_width <= width:
        raise ValueError(
            f"leaf_width={leaf_width} must lie between 1 and the hidden width {width}, equal to it at depth 0"
        )
    return leaf_width


def _hidden(dense: _Dense, activation: Activation, x: Tensor) -> Tensor:
    """(T, H) hidden units."""
    pre = x @ dense.w_in.flatten(0, 1).T + dense.b_in.flatten()
    return hidden_units(pre, resolve_activation(activation), glu=dense.w_in.shape[0] == 2, dropout=0.0)


def _error(layer: nn.Module, dense: _Dense, activation: Activation, x: Tensor) -> float:
    expected = _hidden(dense, activation, x) @ dense.w_out + dense.b_out
    was_training = layer.training
    y = layer.eval()(x.to(next(layer.parameters()).dtype)).to(expected)
    layer.train(was_training)
    spread = (expected - expected.mean(0)).norm().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((y - expected).norm() / spread).item()


def _fill(layer: FFF, leaf: int, dense: _Dense, units: Tensor, mean: Tensor | None) -> None:
    """Give the leaf these units, and its output the mean (H,) of all others."""
    layer.w_in[leaf] = dense.w_in[:, units].flatten(0, 1)
    layer.w_out[leaf] = dense.w_out[units]
    if layer.b_in is None:
        return
    others = dense.w_out.new_zeros(()) if mean is None else mean.index_fill(0, units, 0.0) @ dense.w_out
    layer.b_in[leaf] = dense.b_in[:, units].flatten()
    layer.b_out[leaf] = dense.b_out + others


def _grow(
    layer: FFF, first: int, nodes: list[_Node], dense: _Dense, x: Tensor, hidden: Tensor, method: Method
) -> list[_Node]:
    """Set the nodes of one level, `first` and those right of it, and pass rows and units on to their children."""
    children = []
    for node, here in enumerate(nodes, first):
        rows = x[here.rows]
        split = (
            _split_inputs(rows, here.units)
            if method == "inputs"
            else _split_units(rows, hidden[here.rows], here, dense)
        )
        layer.node_weight[node], layer.node_bias[node] = split.weight, split.bias
        right = rows @ split.weight + split.bias >= 0
        for side, units in zip((~right, right), split.units, strict=True):
            # A child that no row reaches is made from the rows of its parent: some row will come there one day.
            children.append(_Node(here.rows[side] if side.any() else here.rows, units))
    return children


def _split_inputs(rows: Tensor, units: Tensor) -> _Split:
    mean = rows.mean(0)
    direction, threshold = _two_means(rows - mean)
    return _Split(*_unit_variance(direction, -threshold - direction @ mean, rows), (units, units))


def _split_units(rows: Tensor, hidden: Tensor, node: _Node, dense: _Dense) -> _Split:
    weights = dense.w_in[:, node.units].transpose(0, 1).flatten(1)
    points = nn.functional.normalize(weights, dim=1)
    points = points - points.mean(0)
    order = (points @ _two_means(points)[0]).argsort()  # not the threshold, so that ties are halved too
    left, right = node.units[order[: len(order) // 2]], node.units[order[len(order) // 2 :]]
    weight = dense.w_out.square().sum(1)
    gain = hidden[:, right].square() @ weight[right] - hidden[:, left].square() @ weight[left]
    return _Split(*_unit_variance(*_affine_fit(rows, gain), rows), (left, right))


def _two_means(points: Tensor) -> tuple[Tensor, Tensor]:
    """Direction (D,) and threshold () of a hyperplane that halves centred points (n, D) as two-means with equal halves.

    Given the two means, the halves of least squared distance are those of the order along the line through the means;
    the means follow, until the halves stay. It begins at the point farthest out, so that nothing is random.
    """
    direction = points[points.square().sum(1).argmax()]
    half, before = len(points) // 2, None
    for _ in range(_MOST_STEPS):
        order = (points @ direction).argsort()
        left, right = order[:half], order[half:]
        chosen = right.sort().values
        if half == 0 or before is not None and torch.equal(chosen, before):
            break
        before = chosen
        direction = points[right].mean(0) - points[left].mean(0)
    along = (points @ direction).sort().values
    threshold = (along[half - 1] + along[half]) / 2 if half else along[0]
    return direction, threshold


def _affine_fit(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares weight (D,) and bias () of target (n,) on rows (n, D); a small ridge decides where rows are few."""
    mean = rows.mean(0)
    centred, wanted = (rows - mean).double(), (target - target.mean()).double()
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean().clamp_min(torch.finfo(rows.dtype).tiny)
    gram.diagonal().add_(ridge)
    weight = torch.linalg.solve(gram, centred.T @ wanted).to(rows.dtype)
    return weight, target.mean() - weight @ mean


def _unit_variance(weight: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same hyperplane with logits of unit variance on the rows; where all are equal, as it is."""
    spread = (rows @ weight).std(correction=0)
    scale = torch.where(spread > 0, 1 / spread, torch.ones_like(spread))
    return weight * scale, bias * scale
