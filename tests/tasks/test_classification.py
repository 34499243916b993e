"""Loss, optimiser and schedules of the classification task."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

import fff
from fff.layers.contract import Record, RoutedLayer, Size
from fff.models import Classifier
from fff.tasks import Classification, LayerSchedule
from fff.tasks.protocol import Best


class Priced(RoutedLayer):
    """Linear layer with the auxiliary loss 0.5 * price, whose gradient is 0.5 in each forward."""

    def __init__(self, in_features, out_features, hardening_weight=0.0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = nn.Linear(in_features, out_features)
        self.price = nn.Parameter(torch.zeros(()))
        self.hardening_weight = hardening_weight

        self.bias_updates = 0

    @property
    def size(self):
        return Size(0, 0, 0, 0, 0)

    def update_bias(self):
        self.bias_updates += 1

    def forward(self, x):
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        self.record = Record(0.5 * self.price, {"price": self.price.detach()}, index, 1, "linear")
        return self.linear(x)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    return x, torch.arange(24) % 5


@pytest.fixture
def data(tensor_data, rows):
    return lambda batch_size=24: tensor_data(rows, rows, rows, batch_size=batch_size)


def make_task(optimizer=None, **options):
    torch.manual_seed(0)
    return Classification(
        Classifier(Priced, 4, 5),
        num_classes=5,
        optimizer=optimizer or partial(torch.optim.SGD, lr=1.0),
        **options,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_auxiliary_loss_is_added_once(data, fit, accumulate):
    task = make_task()
    fit(task, data(24 // accumulate), max_epochs=1, accumulate_grad_batches=accumulate)
    assert task.model.ff.price.item() == pytest.approx(-0.5)


def test_one_step_is_that_of_the_plain_formula(data, fit, rows):
    task = make_task(label_smoothing=0.2)
    x, y = rows
    linear = task.model.ff.linear
    loss = F.cross_entropy(linear(x), y, label_smoothing=0.2)
    expected = linear.weight - torch.autograd.grad(loss, linear.weight)[0]
    fit(task, data(), max_epochs=1)
    torch.testing.assert_close(linear.weight, expected)


def test_fast_dev_run_is_one_step_of_the_plain_formula_and_has_results(data, fit, rows):
    task, module = make_tree(), data(batch_size=6)
    x, y = next(iter(module.train_dataloader()))[:2]
    model = copy.deepcopy(task.model)
    (F.cross_entropy(model(x), y) + fff.aux_loss(model)).backward()
    trainer = fit(task, module, max_epochs=1, fast_dev_run=True)
    assert trainer.global_step == 1
    for parameter, plain in zip(task.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, plain - 0.1 * plain.grad)
    assert task.results(module)["metrics"]["epochs"] == 1


def test_task_loss_and_auxiliary_losses_are_logged_apart_and_weighted_by_rows(data, fit, rows, tmp_path):
    task = make_task(optimizer=partial(torch.optim.SGD, lr=0.0))
    task.model.ff.price.data.fill_(3.0)
    x, y = rows
    # Batches of 10, 10 and 4 rows.
    trainer = fit(task, data(batch_size=10), max_epochs=1, logger=CSVLogger(tmp_path))
    logged = trainer.callback_metrics
    assert logged["train_loss"].item() == pytest.approx(F.cross_entropy(task.model(x), y).item(), rel=1e-5)
    assert logged["train_aux_loss"].item() == pytest.approx(1.5)
    assert logged["train_price"].item() == pytest.approx(3.0)
    assert task.protocol.history["train_loss"] == [pytest.approx(logged["train_loss"].item())]
    assert {"train_accuracy", "val_accuracy", "leaves_used"} <= set(logged)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (2, 4)])
def test_decision_biases_move_after_each_optimiser_step(data, fit, accumulate, updates):
    task = make_task()
    fit(task, data(batch_size=6), max_epochs=2, accumulate_grad_batches=accumulate)
    assert task.model.ff.bias_updates == updates


def test_fused_only_where_it_is_safe():
    def fused(optimizer, model=None):
        task = Classification(model or Classifier(Priced, 4, 5), num_classes=5, optimizer=optimizer)
        return task.configure_optimizers().param_groups[0].get("fused")

    assert fused(partial(torch.optim.AdamW, lr=1e-3)) is True
    assert fused(partial(torch.optim.SGD, lr=1e-3)) is True
    assert fused(partial(torch.optim.AdamW, lr=1e-3, fused=False)) is False
    assert not fused(partial(torch.optim.AdamW, lr=1e-3, foreach=True))
    assert fused(partial(torch.optim.RMSprop, lr=1e-3)) is None
    assert not fused(partial(torch.optim.AdamW, lr=1e-3), Classifier(Priced, 4, 5).to("meta"))


@pytest.mark.parametrize("options, rows", [({}, "train"), ({"plateau": "val"}, "val")])
def test_learning_rate_halves_on_a_plateau_of_the_chosen_accuracy(
    scripted, scripted_data, fit, tmp_path, options, rows
):
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    script = {"train": rising, "val": rising, "test": rising, rows: [0.1, 0.2, 0.2, 0.2, 0.2, 0.2]}
    task = Classification(
        scripted(**script),
        num_classes=5,
        optimizer=partial(torch.optim.SGD, lr=0.8),
        lr_schedule=partial(ReduceLROnPlateau, mode="max", factor=0.5, patience=1),
        **options,
    )
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = fit(task, scripted_data(), max_epochs=6, callbacks=[Rates()], logger=CSVLogger(tmp_path))
    # Gains in epochs 1 and 2; two epochs without one (3, 4) halve the rate for epoch 5.
    assert rates == [0.8, 0.8, 0.8, 0.8, 0.4, 0.4]
    assert trainer.callback_metrics["lr"].item() == pytest.approx(0.2)


def test_a_plateau_of_falling_accuracies_is_refused(data, fit):
    task = make_task(lr_schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="needs mode='max'"):
        fit(task, data(), max_epochs=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_an_epoch_add_up_in_half_precision(dtype):
    task = make_task()
    for _ in range(100):
        task._add("loss", torch.tensor(2.25, dtype=dtype), 1000)
    task._rows = 100_000
    assert task.pop_epoch_losses() == {"loss": 2.25}


def test_a_plateau_of_other_rows_is_refused(scripted):
    with pytest.raises(ValueError, match="plateau='test'"):
        Classification(scripted(train=[0], val=[0], test=[0]), num_classes=5, optimizer=torch.optim.SGD, plateau="test")


def test_other_schedulers_step_once_per_epoch(data, fit):
    from torch.optim.lr_scheduler import StepLR

    task = make_task(lr_schedule=partial(StepLR, step_size=1, gamma=0.1))
    trainer = fit(task, data(batch_size=6), max_epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_layer_schedule_is_linear_between_its_points_and_constant_outside():
    schedule = LayerSchedule("hardening_weight", [[2, 1.0], [4, 3.0], [5, 0.0]])
    assert [schedule.value(epoch) for epoch in range(7)] == [1.0, 1.0, 1.0, 2.0, 3.0, 0.0, 0.0]


def test_layer_schedule_reaches_the_layers_before_the_first_step(data, fit):
    seen = []
    task = make_task(schedules={"hardening_weight": [[0, 0.0], [2, 3.0]]})
    task.model.ff.register_forward_pre_hook(lambda layer, _: seen.append((layer.training, layer.hardening_weight)))
    fit(task, data(), max_epochs=3)
    assert [weight for training, weight in seen if training] == [0.0, 1.5, 3.0]


def test_layer_schedule_of_an_attribute_that_no_layer_has(data, fit):
    with pytest.raises(ValueError, match="hardning_weight"):
        fit(make_task(schedules={"hardning_weight": [[0, 1.0]]}), data(), max_epochs=1)


class Weights(Callback):
    """Weight and momentum that the first step of each epoch finds, and the weight after it."""

    def __init__(self):
        self.before, self.momentum, self.after = [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        weight = task.model.ff.linear.weight
        if batch_idx == 0:
            self.before.append(weight.detach().clone())
            self.momentum.append("momentum_buffer" in trainer.optimizers[0].state[weight])

    def on_train_epoch_end(self, trainer, task):
        self.after.append(task.model.ff.linear.weight.detach().clone())


def test_restart_from_best_goes_back_to_the_best_validation_accuracy_once(data, fit, rows, monkeypatch):
    """The second of four epochs is the best; the fourth starts from its weights, without momentum."""
    task = make_task(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), restart_from_best=[3])
    seen = Weights()
    scripted = {"train": [0.1, 0.2, 0.9, 0.3], "val": [0.2, 0.6, 0.4, 0.5]}
    names, offer = {id(best): name for name, best in task.protocol.best.items()}, Best.offer

    def offer_scripted(self, _, epoch, model):
        offer(self, scripted[names[id(self)]][epoch - 1], epoch, model)

    monkeypatch.setattr(Best, "offer", offer_scripted)
    fit(task, data(batch_size=6), max_epochs=4, callbacks=[seen])
    assert torch.equal(seen.before[3], seen.after[1]) and not torch.equal(seen.before[3], seen.after[2])
    assert torch.equal(seen.before[2], seen.after[1]), "no restart before the second epoch that follows it"
    assert seen.momentum == [False, True, True, False]
    # What the protocol keeps is a copy: the steps after the restart must not change it.
    assert not torch.equal(seen.after[3], seen.before[3])
    torch.testing.assert_close(task.protocol.best["val"].weights["ff.linear.weight"], seen.after[1])


def test_restart_before_the_first_epoch_is_refused():
    with pytest.raises(ValueError, match=r"restart_from_best=\[0, 3\]"):
        make_task(restart_from_best=[0, 3])


@pytest.mark.parametrize("points", [[], [[0, 1], [0, 2]], [[3, 1], [1, 2]], [[1]]])
def test_layer_schedule_with_bad_points(points):
    with pytest.raises(ValueError, match="schedule of 'temperature'"):
        LayerSchedule("temperature", points)


def test_data_without_training_rows_for_evaluation(data):
    task, module = make_task(), data()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=task.protocol_callbacks(),
    )
    with pytest.raises(ValueError, match="train_eval_dataloader"):
        trainer.fit(task, module.train_dataloader())


def test_no_warning_about_the_missing_validation_step(data, fit, recwarn):
    fit(make_task(), data(), max_epochs=1)
    assert not [w for w in recwarn if "validation_step" in str(w.message)]


def test_the_config_builds_the_task(rows, data, fit):
    from pathlib import Path

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    conf = Path(__file__).parents[2] / "conf"
    config = OmegaConf.load(conf / "task" / "classification.yaml")
    config.schedules = {"temperature": [[0, 1.0], [2, 2.0]]}
    make_model = instantiate(OmegaConf.load(conf / "model" / "classifier.yaml"))
    model = make_model(make_ff=partial(fff.FFF, leaf_width=2, depth=2), in_features=4, num_classes=5)
    task = instantiate(config)(model=model, num_classes=5)
    module = data()
    fit(task, module, max_epochs=2)
    assert task.model.ff.temperature == pytest.approx(1.5)
    assert task.results(module)["metrics"]["num_leaves"] == 4


def make_tree(**options):
    torch.manual_seed(0)
    make_ff = partial(fff.FFF, leaf_width=2, depth=2, mode="straight_through", balance_weight=0.1)
    return Classification(
        Classifier(make_ff, 4, 5), num_classes=5, optimizer=partial(torch.optim.SGD, lr=0.1), **options
    )


def test_the_router_has_a_learning_rate_of_its_own(data, fit):
    """One step of plain gradient descent: its length is in proportion to the rate."""
    moved = {}
    for factor in (1.0, 3.0):
        task = make_tree(router_lr_factor=factor)
        before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        fit(task, data(), max_epochs=1)
        moved[factor] = {name: p.detach() - before[name] for name, p in task.model.named_parameters()}
    for name, step in moved[1.0].items():
        torch.testing.assert_close(moved[3.0][name], step * (3.0 if ".node_" in name else 1.0))
    assert moved[1.0]["ff.node_weight"].abs().sum() > 0


def test_a_rate_that_is_a_tensor_stays_that_of_the_rest():
    model = Classifier(partial(fff.FFF, leaf_width=2, depth=2), 4, 5)
    optimizer = partial(torch.optim.AdamW, lr=torch.tensor(0.01), foreach=False)
    task = Classification(model, num_classes=5, optimizer=optimizer, router_lr_factor=0.1)
    rest, router = (float(group["lr"]) for group in task.build_optimizer().param_groups)
    assert (rest, router) == (pytest.approx(0.01), pytest.approx(0.001))


def test_a_schedule_keeps_the_ratio_of_the_rates(data, fit):
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    task = make_tree(router_lr_factor=3.0, lr_schedule=schedule)
    trainer = fit(task, data(), max_epochs=2)
    rest, router = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert router == pytest.approx(3 * rest) and rest == pytest.approx(0.05)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_router_that_does_not_learn_is_refused(factor):
    with pytest.raises(ValueError, match="router_lr_factor="):
        make_task(router_lr_factor=factor)


def test_a_layer_without_router_has_no_rate_for_it(data, fit):
    with pytest.raises(ValueError, match="router_lr_factor=2.0: no layer"):
        fit(make_task(router_lr_factor=2.0), data(), max_epochs=1)


def test_deviations_have_a_weight_decay_of_their_own(data, fit):
    """Without a gradient a step of AdamW is its decay: deviations lose lr * decay, all others nothing."""
    make_ff = partial(fff.FFF, leaf_width=2, depth=2, mode="straight_through", base=True)
    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    model = Classifier(make_ff, 4, 5)
    task = Classification(model, num_classes=5, optimizer=optimizer, deviation_decay=2.0)
    with torch.no_grad():
        for deviation in model.ff.deviations():
            deviation.fill_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = task.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 0.8 if name in ("ff.w_in", "ff.b_in", "ff.w_out", "ff.b_out") else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_router_rate_and_decay_of_deviations_go_together():
    make_ff = partial(fff.FFF, leaf_width=2, depth=2, mode="straight_through", base=True)
    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    task = Classification(
        Classifier(make_ff, 4, 5), num_classes=5, optimizer=optimizer, deviation_decay=2.0, router_lr_factor=3.0
    )
    groups = task.configure_optimizers().param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 0.5, 4),  # the base
        (0.1, 2.0, 4),
        (pytest.approx(0.3), 0.5, 2),
    ]


def test_a_layer_without_base_has_no_deviations_to_decay(data, fit):
    with pytest.raises(ValueError, match="deviation_decay=2.0: no layer"):
        fit(make_tree(deviation_decay=2.0), data(), max_epochs=1)


def test_an_optimizer_without_decay_is_refused_a_decay():
    model = Classifier(partial(fff.FFF, leaf_width=2, depth=2, base=True), 4, 5)
    task = Classification(model, num_classes=5, optimizer=partial(torch.optim.Rprop, lr=0.1), deviation_decay=2.0)
    with pytest.raises(ValueError, match="deviation_decay=2.0: the optimizer Rprop has no weight decay"):
        task.build_optimizer()


@pytest.mark.parametrize("decay", [-1.0, float("nan")])
def test_a_decay_below_zero_is_refused(decay):
    with pytest.raises(ValueError, match="deviation_decay="):
        make_task(deviation_decay=decay)


def test_a_search_never_looks_at_the_test_rows(data, fit):
    task, module = make_tree(test=False), data()
    fit(task, module, max_epochs=2)
    metrics = task.results(module)["metrics"]
    assert module.looks_at_test == 0
    assert metrics["ga"] is metrics["macro_f1"] is metrics["leaf_load"] is None
    assert metrics["val_accuracy"] == max(task.protocol.history["val_accuracy"])
    assert metrics["ma"] == max(task.protocol.history["train_accuracy"])


def test_routes_of_rows_that_are_not_looked_at_are_refused():
    with pytest.raises(ValueError, match="keep_routes=True keeps those of the test data"):
        make_tree(keep_routes=True, test=False)
