"""The books of the MA/GA protocol, against a layer whose accuracies are scripted."""

import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

import fff
from fff.models import Classifier
from fff.tasks import Classification, evaluate
from fff.tasks.protocol import HISTORY, dispatch_entropy

SGD = partial(torch.optim.SGD, lr=0.1)
#         epoch    1     2     3     4     5     6     7
TRAIN = [0.30, 0.50, 0.60, 0.90, 0.90, 0.80, 0.95]
VAL = [0.20, 0.75, 0.75, 0.50, 0.50, 0.50, 0.50]
TEST = [0.10, 0.40, 0.65, 0.70, 0.70, 0.70, 1.00]
SOFT = [0.15, 0.55, 0.65, 0.85, 0.10, 0.10, 0.10]


def make_task(model, **options):
    return Classification(model, num_classes=5, optimizer=SGD, **options)


@pytest.fixture
def run(scripted, scripted_data, fit):
    def run(max_epochs=7, patience=50, data=None, **script):
        script = {"train": TRAIN, "val": VAL, "test": TEST} | script
        task = make_task(scripted(**script), patience=patience)
        data = data or scripted_data()
        fit(task, data, max_epochs=max_epochs)
        return task.results(data), data

    return run


def test_ma_is_the_best_training_accuracy_and_ga_the_test_accuracy_of_the_best_validation_epoch(run):
    result, data = run(max_epochs=6)
    metrics = result["metrics"]
    # Epochs 4 and 5 tie in training, 2 and 3 in validation: the first counts. The best test accuracy is never taken.
    assert (metrics["ma"], metrics["ma_epochs"]) == (pytest.approx(0.90), 4)
    assert (metrics["ga"], metrics["ga_epochs"]) == (pytest.approx(0.40), 2)
    assert metrics["val_accuracy"] == pytest.approx(0.75)
    assert metrics["epochs"] == 6 and metrics["diverged"] is False
    assert data.looks_at_test == 1


def test_history_has_one_row_per_epoch(run):
    history = run(max_epochs=3)[0]["history"]
    assert history["epoch"] == [1, 2, 3]
    assert history["train_accuracy"] == pytest.approx(TRAIN[:3])
    assert history["val_accuracy"] == pytest.approx(VAL[:3])
    # Mean over the nodes that were evaluated: the third node is nan.
    assert history["node_entropy"] == pytest.approx([math.log(2) / 2] * 3)
    assert history["leaves_used"] == [4] * 3
    assert len(history["train_loss"]) == 3


def test_history_has_the_entropy_of_each_tree_where_there_are_several(tensor_data, fit):
    layers = [fff.FFF(4, 2, depth=1), fff.FeedForward(4, 3), fff.FFF(4, 2, out_features=5, depth=2)]
    rows = torch.randn(30, 4), torch.arange(30) % 5
    task = make_task(torch.nn.Sequential(*layers))
    fit(task, data := tensor_data(rows, rows, rows), max_epochs=2)
    history = task.results(data)["history"]
    one, two = history.pop("node_entropy_1"), history.pop("node_entropy_2")
    assert len(one) == len(two) == 2 and one != two and "node_entropy_3" not in history
    # A tree of one node and a tree of three.
    assert history["node_entropy"] == pytest.approx([(a + 3 * b) / 4 for a, b in zip(one, two, strict=True)])


def test_history_of_a_single_tree_is_that_of_the_records_of_the_past(tensor_data, fit):
    rows = torch.randn(30, 4), torch.arange(30) % 5
    task = make_task(fff.FFF(4, 2, out_features=5, depth=2))
    fit(task, data := tensor_data(rows, rows, rows), max_epochs=1)
    assert set(task.results(data)["history"]) == set(HISTORY)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 6), (2, 7)])
def test_training_stops_when_neither_accuracy_improved_for_patience_epochs(
    scripted, scripted_data, fit, patience, epochs
):
    # The last gain is in training, at epoch 5; validation stands still from epoch 1 on, equal values are no gain.
    flat = [0.5] * 9
    model = scripted(train=[0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5], val=flat, test=flat)
    task = make_task(model, patience=patience)
    fit(task, scripted_data(), max_epochs=9)
    assert len(task.protocol.history["epoch"]) == epochs


def test_training_stops_at_the_loss_that_was_asked_for(scripted, scripted_data, fit):
    model = scripted(train=TRAIN, val=VAL, test=TEST)
    task = make_task(model, stop_loss=1.2)
    fit(task, scripted_data(), max_epochs=7)
    losses = task.protocol.history["train_loss"]
    assert losses[-1] <= 1.2 < min(losses[:-1]) and len(losses) < 7


def test_a_gain_in_validation_alone_keeps_the_training_going(scripted, scripted_data, fit):
    flat = [0.5] * 6
    model = scripted(train=flat, val=[0.1, 0.2, 0.3, 0.4, 0.4, 0.4], test=flat)
    task = make_task(model, patience=2)
    fit(task, scripted_data(), max_epochs=6)
    assert len(task.protocol.history["epoch"]) == 6


def test_soft_accuracies_are_those_of_the_weights_that_gave_ma_and_ga(run):
    metrics = run(max_epochs=6, soft=SOFT)[0]["metrics"]
    assert metrics["ma_soft"] == pytest.approx(SOFT[3])
    assert metrics["ga_soft"] == pytest.approx(SOFT[1])


def test_no_soft_accuracy_without_a_soft_route(run):
    metrics = run()[0]["metrics"]
    assert metrics["ma_soft"] is None and metrics["ga_soft"] is None


def test_usage_and_sizes(run):
    result, _ = run()
    metrics = result["metrics"]
    assert metrics["leaf_load"] == [10, 10, 10, 10, 0]
    assert (metrics["leaves_used"], metrics["num_leaves"], metrics["largest_leaf_share"]) == (4, 5, 0.25)
    assert metrics["node_entropy"] == pytest.approx(math.log(2) / 2)
    assert metrics["nodes_below_0.10"] == pytest.approx(0.5)
    assert (metrics["training_width"], metrics["inference_width"]) == (40, 8)
    assert (metrics["training_size"], metrics["inference_size"]) == (43, 10)
    assert (metrics["flops_per_row"], metrics["parameters"]) == (1234, 1)
    assert result["backend"] == "scripted"


def test_metrics_do_not_depend_on_the_evaluation_batch_size(run, scripted_data):
    whole = run()[0]["metrics"]
    sliced = run(data=scripted_data(eval_batch_size=7))[0]["metrics"]
    assert sliced.pop("leaf_load") == whole.pop("leaf_load")
    assert sliced == pytest.approx(whole)


def test_report_metrics_are_those_of_torchmetrics(run):
    metrics = run(max_epochs=2)[0]["metrics"]
    rows = torch.arange(40)
    answer = (rows + (rows / 40 >= TEST[1])) % 5
    assert metrics["ga"] == pytest.approx(multiclass_accuracy(answer, rows % 5, 5, average="micro").item())
    assert metrics["macro_f1"] == pytest.approx(multiclass_f1_score(answer, rows % 5, 5, average="macro").item())
    # Confidence of a one-hot score 1 against four 0 is e / (e + 4), the accuracy 0.4.
    confidence = torch.e / (torch.e + 4)
    assert metrics["calibration_error"] == pytest.approx(abs(confidence - 0.4), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(run, bad):
    result, _ = run(loss=[0.0, 0.0, bad, 0.0, 0.0, 0.0, 0.0], train=[0.3, 0.4, 0.2, 1, 1, 1, 1], val=VAL)
    metrics = result["metrics"]
    assert metrics["diverged"] is True and metrics["epochs"] == 3
    assert (metrics["ma_epochs"], metrics["ga_epochs"]) == (2, 2)


def test_the_epoch_that_diverged_is_in_the_history_and_never_the_best(run):
    result, _ = run(loss=[0.0, 0.0, math.nan], train=[0.3, 0.4, 1.0], val=[0.2, 0.3, 1.0], test=TEST[:3])
    assert result["history"]["val_accuracy"] == pytest.approx([0.2, 0.3, 1.0])
    metrics = result["metrics"]
    assert (metrics["ma"], metrics["ma_epochs"]) == (pytest.approx(0.4), 2)
    assert (metrics["val_accuracy"], metrics["ga_epochs"]) == (pytest.approx(0.3), 2)


def test_weights_spoiled_by_the_last_step_of_an_epoch_are_never_the_best(scripted, scripted_data, fit):
    """The loss of that epoch was still finite."""

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch == 1:
                pl_module.model.ff.weight.data.fill_(math.inf)

    task, data = make_task(scripted(train=TRAIN, val=VAL, test=TEST)), scripted_data()
    fit(task, data, max_epochs=5, callbacks=[Spoil()])
    metrics = task.results(data)["metrics"]
    assert metrics["diverged"] is True and metrics["epochs"] == 2
    assert (metrics["ma_epochs"], metrics["ga_epochs"]) == (1, 1)
    assert task.model.ff.weight.isfinite()


def test_a_run_that_diverges_at_once_has_sizes_but_no_accuracies(tensor_data, fit):
    x, y = torch.randn(30, 4) * 1e30, torch.arange(30) % 5
    model = Classifier(partial(fff.FFF, leaf_width=3, depth=2), 4, 5)
    task = Classification(model, num_classes=5, optimizer=partial(torch.optim.SGD, lr=1e30))
    data = tensor_data((x, y), (x, y), (x, y), batch_size=10)
    fit(task, data, max_epochs=5)
    result = task.results(data)
    metrics = result["metrics"]
    assert metrics["diverged"] is True and metrics["epochs"] == 1
    assert (metrics["num_leaves"], metrics["training_width"]) == (4, 12)
    absent = {name for name, value in metrics.items() if value is None}
    assert absent >= {"ma", "ma_epochs", "ga", "ga_epochs", "val_accuracy", "ga_soft", "leaves_used", "leaf_load"}
    assert data.looks_at_test == 0 and result["backend"]
    json.dumps(result, allow_nan=False)


def test_every_run_has_the_same_metrics(run):
    """A run that diverged at once too."""
    whole, empty = run()[0]["metrics"], run(loss=[math.nan] * 7)[0]["metrics"]
    assert set(whole) == set(empty)


def test_results_are_plain_json(run):
    json.dumps(run()[0], allow_nan=False)


def test_the_model_is_left_with_the_best_validation_weights(scripted, scripted_data, fit):
    task, data = make_task(scripted(train=TRAIN, val=VAL, test=TEST)), scripted_data()
    fit(task, data, max_epochs=6)
    task.results(data)
    assert int(task.model.ff.forwards) == 2


def test_a_scheduled_attribute_has_the_value_of_the_epoch_that_is_measured(scripted, scripted_data, fit):
    task = make_task(scripted(train=TRAIN, val=VAL, test=TEST), schedules={"temperature": [[0, 1.0], [6, 7.0]]})
    data = scripted_data()
    fit(task, data, max_epochs=6)
    layer = task.model.ff
    assert layer.temperatures_in_evaluation == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    layer.temperatures_in_evaluation.clear()
    task.results(data)
    assert layer.temperatures_in_evaluation == [4, 2]  # best epochs 4 (training rows) and 2 (test rows)


def test_evaluation_keeps_every_modules_mode(scripted, scripted_data):
    model = scripted(train=[1.0], val=[1.0], test=[1.0])
    model.ff.forwards += 1
    model.train()
    model.ff.eval()
    evaluate(model, scripted_data().val_dataloader())
    assert model.training and not model.ff.training


def test_results_before_any_epoch_are_refused(scripted, scripted_data):
    with pytest.raises(ValueError, match="at least one epoch"):
        make_task(scripted(train=TRAIN, val=VAL, test=TEST)).results(scripted_data())


def test_bad_arguments_are_named(scripted):
    model = scripted(train=TRAIN, val=VAL, test=TEST)
    with pytest.raises(ValueError, match="patience=0"):
        make_task(model, patience=0)
    with pytest.raises(ValueError, match="label_smoothing=1.5"):
        make_task(model, label_smoothing=1.5)


def test_dispatch_entropy_by_hand():
    cluster = torch.tensor([0, 0, 1, 1, 2, 2])
    alone = torch.tensor([0, 0, 1, 1, 4, 4])[:, None]
    assert dispatch_entropy(alone, cluster) == 0
    assert dispatch_entropy(torch.zeros(6, 1, dtype=torch.int64), cluster) == pytest.approx(math.log(3))
    # Expert 0 takes four rows of two clusters, expert 2 two of one; a dropped choice does not count.
    index = torch.tensor([[0, -1], [0, -1], [0, -1], [0, -1], [2, -1], [2, -1]])
    assert dispatch_entropy(index, cluster) == pytest.approx(4 / 6 * math.log(2))


def test_dispatch_entropy_is_measured_where_the_data_know_clusters(run, scripted_data):
    assert "dispatch_entropy" not in run()[0]["metrics"]
    # Rows go to the experts 0 to 3 in quarters: halves are one cluster for each expert, alternate rows are not.
    for cluster, expected in ((torch.arange(40) // 20, 0.0), (torch.arange(40) % 2, math.log(2))):
        data = scripted_data(eval_batch_size=7)
        data.test_cluster = cluster
        assert run(data=data)[0]["metrics"]["dispatch_entropy"] == pytest.approx(expected)
