"""Routes of rows and of a plane, against trees whose decisions are known."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fff
from fff.models import Classifier
from fff.tasks import Classification
from fff.tasks.routes import GRID, measure_routes, principal_plane

# Around (5, 5, 5): variance 18 / 4 along the second axis, 2 / 4 along the third, none along the first.
CROSS = torch.tensor([[5.0, 8.0, 5.0], [5.0, 2.0, 5.0], [5.0, 5.0, 6.0], [5.0, 5.0, 4.0]])


def batches(x, size=10_000):
    return list(zip(x.split(size), torch.zeros(len(x), dtype=torch.int64).split(size), strict=True))


def test_plane_of_a_cross_worked_by_hand():
    plane = principal_plane(batches(CROSS))
    torch.testing.assert_close(plane.mean, torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(plane.axes, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(plane.share, torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(plane.project(CROSS)[0], torch.tensor([3.0, 0.0], dtype=torch.float64))


def test_plane_does_not_depend_on_batches_and_holds_the_nearest_points():
    x = torch.randn(50, 2, 3)
    plane, sliced = principal_plane(batches(x)), principal_plane(batches(x, 7))
    torch.testing.assert_close(plane.axes, sliced.axes)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
    assert (plane.axes.gather(1, plane.axes.abs().argmax(1, keepdim=True)) > 0).all()
    # What projecting takes off a row is orthogonal to the plane.
    rest = x.flatten(1) - plane.points(plane.project(x))
    torch.testing.assert_close(rest @ plane.axes.T, torch.zeros(50, 2, dtype=torch.float64))


@pytest.fixture
def tree():
    """Depth 2 over 3 inputs: the root asks whether the second is >= 5, both nodes below whether the third is. A leaf
    answers its own number."""
    model = Classifier(partial(fff.FFF, leaf_width=1, depth=2), 3, 4)
    layer = model.ff
    with torch.no_grad():
        layer.node_weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        layer.node_bias.fill_(-5.0)
        layer.w_out.zero_()
        layer.b_out.copy_(torch.eye(4))
    return model


def test_routes_of_a_tree_worked_by_hand(tree):
    test = torch.tensor([[9.0, 4.0, 4.0], [9.0, 4.0, 6.0], [9.0, 6.0, 4.0], [9.0, 6.0, 6.0], [9.0, 7.0, 4.0]])
    label = torch.tensor([3, 1, 0, 2, 1])
    routes = measure_routes(tree, batches(CROSS), [(test[:2], label[:2]), (test[2:], label[2:])])
    assert routes["index"].tolist() == [[0], [1], [2], [3], [2]] and routes["index"].dtype == np.int8
    assert routes["label"].tolist() == label.tolist()
    np.testing.assert_allclose(routes["points"], [[-1, -1], [-1, 1], [1, -1], [1, 1], [2, -1]], atol=1e-6)
    # The grid covers the points, and its rows are those of y: the root, which looks at x alone, parts the columns.
    x, y = routes["x"], routes["y"]
    assert x[0] < -1 and x[-1] > 2 and y[0] < -1 and y[-1] > 1
    expected = 2 * (x >= 0)[None, :] + (y >= 0)[:, None]
    np.testing.assert_array_equal(routes["plane_index"], expected)
    np.testing.assert_array_equal(routes["plane_class"], expected)
    assert routes["plane_index"].shape == (GRID, GRID)
    np.testing.assert_allclose(routes["plane_share"], [0.9, 0.1])


def test_every_choice_is_kept_and_the_first_one_cuts_the_plane():
    model = Classifier(partial(fff.MoE, expert_width=2, num_experts=200, top_k=2, router="mixtral"), 6, 3)
    x = torch.randn(40, 2, 3)
    routes = measure_routes(model, batches(x), batches(x, 7))
    model.eval()(x)
    np.testing.assert_array_equal(routes["index"], model.ff.record.index)
    assert routes["index"].dtype == np.int16
    plane = principal_plane(batches(x))
    corner = torch.tensor([[routes["x"][0], routes["y"][-1]]], dtype=torch.float64)
    answer = model(plane.points(corner).float()).argmax(-1)
    assert routes["plane_index"][-1, 0] == model.ff.record.index[0, 0]
    assert routes["plane_class"][-1, 0] == answer


def make_task(model, lr=0.1, **options):
    return Classification(model, num_classes=4, optimizer=partial(torch.optim.SGD, lr=lr), **options)


def test_task_routes_are_those_of_its_results(tree, tensor_data, fit):
    x, y = torch.randn(30, 3) + 5, torch.arange(30) % 4
    data = tensor_data((x, y), (x, y), (x, y), batch_size=10, eval_batch_size=7)
    task = make_task(tree, keep_routes=True)
    fit(task, data, max_epochs=3)
    load = task.results(data)["metrics"]["leaf_load"]
    routes = task.routes(data)
    assert np.bincount(routes["index"][:, 0], minlength=4).tolist() == load
    assert routes["label"].tolist() == y.tolist()


def test_no_routes_without_weights(tensor_data, fit):
    x, y = torch.randn(30, 3) * 1e30, torch.arange(30) % 4
    data = tensor_data((x, y), (x, y), (x, y), batch_size=10)
    task = make_task(Classifier(partial(fff.FFF, leaf_width=3, depth=2), 3, 4), lr=1e30, keep_routes=True)
    fit(task, data, max_epochs=2)
    assert task.results(data)["metrics"]["diverged"] and task.routes(data) is None


def test_a_layer_that_sees_tokens_is_refused_before_training(tensor_data, fit):
    x, y = torch.randn(30, 6), torch.arange(30) % 4
    make_ff = partial(fff.FFF, leaf_width=3, depth=2, mode="straight_through")
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), make_ff(3), nn.Flatten(), nn.Linear(6, 4))
    task = make_task(model, keep_routes=True)
    with pytest.raises(ValueError, match="sees each row once: of 30 rows it sees 60"):
        fit(task, tensor_data((x, y), (x, y), (x, y)), max_epochs=1)
    assert not task.protocol.history["epoch"]


def test_clusters_of_rows_are_no_clusters_of_tokens(tensor_data, fit):
    x, y = torch.randn(30, 6), torch.arange(30) % 4
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), fff.FFF(3, 3, depth=2), nn.Flatten(), nn.Linear(6, 4))
    task, data = make_task(model), tensor_data((x, y), (x, y), (x, y))
    data.test_cluster = y
    fit(task, data, max_epochs=1)
    assert "dispatch_entropy" not in task.results(data)["metrics"]


@pytest.mark.parametrize("num_layers", [0, 2])
def test_a_model_with_other_than_one_routed_layer_is_refused(num_layers):
    model = nn.Sequential(nn.Linear(3, 3), *(fff.FFF(3, 2, depth=1) for _ in range(num_layers)))
    make_task(model)
    with pytest.raises(ValueError, match=f"keep_routes=True .*one routed layer, not {num_layers}"):
        make_task(model, keep_routes=True)
