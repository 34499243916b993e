"""A language model learns a text, is measured by the weights of its best validation loss, and resumes where it was."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

import fff
from fff.data import TextData
from fff.layers.contract import Record, RoutedLayer, Size, TreeTrace
from fff.models import GPT
from fff.tasks import LanguageModeling, language_modeling
from fff.tasks.language_modeling import active_parameters, warmup_cosine
from fff.tasks.text_routes import CLASSES, measure_text_routes, token_class

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* holds a text of digest"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
TREE = partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", balance_weight=0.1)
DENSE = partial(fff.FeedForward, hidden_features=8)


@pytest.fixture
def data(tmp_path):
    """A rhyme over and over: 12 characters, of which the one before tells the next but for two."""
    folder = tmp_path / "tiny_shakespeare"
    folder.mkdir()
    (folder / "input.txt").write_text(80 * "Ring a rose.\n")
    return lambda **options: TextData("tiny_shakespeare", root=tmp_path, context=16, batch_size=8, **options)


def make_task(data, make_ff=TREE, depth=2, lr=0.01, **options):
    torch.manual_seed(0)
    model = GPT(make_ff, data.in_shape, data.num_classes, dim=16, depth=depth, heads=2)
    return LanguageModeling(model, optimizer=partial(torch.optim.AdamW, lr=lr), **{"warmup_steps": 2, **options})


def test_the_loss_falls_and_the_results_tell_it_in_bits(data, fit):
    module = data()
    task = make_task(module)
    fit(task, module, max_epochs=6, limit_train_batches=15)
    found = task.results(module)
    metrics, history = found["metrics"], found["history"]
    assert history["train_loss"][0] > 1.0 and history["train_loss"][-1] < 0.5
    assert metrics["val_loss"] == min(history["val_loss"]) == history["val_loss"][metrics["val_epochs"] - 1]
    assert metrics["test_loss"] < 0.6 and metrics["test_accuracy"] > 0.8
    assert metrics["bits_per_character"] == pytest.approx(metrics["test_loss"] / math.log(2))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["test_loss"]))
    assert metrics["tokens_per_second"] > 0 and metrics["epochs"] == 6 and not metrics["diverged"]
    assert metrics["num_leaves"] == len(metrics["leaf_load"]) == 8
    assert metrics["leaves_used_1"] + metrics["leaves_used_2"] == metrics["leaves_used"]
    assert sum(metrics["leaf_load"]) == 2 * 6 * 16  # two layers, six windows of the last 104 characters
    assert metrics["training_width"] == 32 and metrics["inference_width"] == 8
    assert len(history["node_entropy_1"]) == len(history["leaves_used"]) == 6


def test_the_measured_weights_are_those_of_the_best_validation_loss(data, fit):
    module = data()
    task = make_task(module)
    fit(task, module, max_epochs=2, limit_train_batches=10)
    best = {name: value.clone() for name, value in task.protocol.best_weights.items()}
    for parameter in task.model.parameters():
        parameter.data.add_(1.0)
    measured = task.results(module)["metrics"]["test_loss"]
    assert all(torch.equal(value, best[name]) for name, value in task.model.state_dict().items())
    x, y = (torch.cat(part) for part in zip(*module.test_dataloader(), strict=True))
    with torch.no_grad():
        assert measured == pytest.approx(F.cross_entropy(task.model(x).flatten(0, 1), y.flatten()).item(), rel=1e-5)


def test_an_epoch_that_is_worse_is_not_the_best(data, fit, monkeypatch):
    losses, measure = iter([1.0, 0.5, 0.8]), language_modeling.evaluate_text
    monkeypatch.setattr(
        language_modeling, "evaluate_text", lambda *call: measure(*call)._replace(loss=next(losses, 0.0))
    )
    module = data()
    task = make_task(module)
    fit(task, module, max_epochs=3, limit_train_batches=3)
    assert (task.protocol.best_epoch, task.protocol.best_loss) == (2, 0.5)
    last = task.model.state_dict()
    assert not all(torch.equal(value, last[name]) for name, value in task.protocol.best_weights.items())


def test_scheduled_attributes_are_those_of_the_best_epoch_when_measured(data, fit, monkeypatch):
    losses, measure = iter([1.0, 0.5, 0.8]), language_modeling.evaluate_text
    seen = []

    def evaluate_text(model, batches):
        seen.append([layer.temperature for layer in model.modules() if isinstance(layer, fff.FFF)])
        return measure(model, batches)._replace(loss=next(losses, 0.0))

    monkeypatch.setattr(language_modeling, "evaluate_text", evaluate_text)
    module = data()
    task = make_task(module, schedules={"temperature": [[0, 1.0], [2, 3.0]]})
    fit(task, module, max_epochs=3, limit_train_batches=3)
    task.results(module)
    assert seen == [
        [1.0, 1.0],
        [2.0, 2.0],
        [3.0, 3.0],
        *2 * [[2.0, 2.0]],
    ]  # the hard and the soft route on the test text


def test_without_test_the_test_text_is_never_looked_at(data, fit, monkeypatch):
    module = data()
    task = make_task(module, test=False)
    fit(task, module, max_epochs=2, limit_train_batches=3)
    monkeypatch.setattr(TextData, "test_dataloader", lambda module: pytest.fail("it was looked at"))
    metrics = task.results(module)["metrics"]
    assert metrics["test_loss"] is metrics["bits_per_character"] is metrics["test_accuracy"] is None
    assert metrics["val_loss"] == min(task.protocol.history["val_loss"]) and metrics["num_leaves"] == 8


def test_the_soft_mixture_is_measured_beside_the_hard_route(data, fit):
    for make_ff, soft in ((TREE, True), (DENSE, False)):
        module = data()
        task = make_task(module, make_ff)
        fit(task, module, max_epochs=1, limit_train_batches=3)
        found = task.results(module)["metrics"]
        assert (found["test_loss_soft"] is not None) == soft
        assert not soft or found["test_loss_soft"] != found["test_loss"]


def test_a_loss_beyond_what_exp_can_tell_has_an_infinite_perplexity(data, fit):
    """Finite weights can be so wrong that the perplexity is no float; the run is to be recorded all the same."""
    module = data()
    task = make_task(module, DENSE)
    fit(task, module, max_epochs=1, limit_train_batches=1)
    task.protocol.best_weights["norm.weight"] *= 1e6
    metrics = task.results(module)["metrics"]
    assert 710 < metrics["test_loss"] < math.inf and metrics["perplexity"] == math.inf


def test_without_feedforward_layers_nothing_is_routed(data, fit):
    module = data()
    task = make_task(module, fff.NoFeedForward, keep_routes=True)
    fit(task, module, max_epochs=1, limit_train_batches=3)
    metrics = task.results(module)["metrics"]
    assert metrics["leaf_load"] == [] and metrics["largest_leaf_share"] is None and metrics["num_leaves"] == 0
    assert metrics["active_parameters"] == metrics["parameters"] > 0
    assert task.routes(module) is None


class Priced(RoutedLayer):
    """Adds the auxiliary loss 0.5 * price, whose gradient is 0.5 in each forward."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.price = nn.Parameter(torch.zeros(()))

    @property
    def size(self):
        return Size(0, 0, 0, 0, 0)

    def forward(self, x):
        self.record = Record(0.5 * self.price, {"price": self.price.detach()}, torch.zeros(1, 1).long(), 1, "none")
        return torch.zeros_like(x)


def test_the_auxiliary_loss_is_added_once_for_each_layer(data, fit):
    module = data()
    task = make_task(module, Priced)
    task.make_optimizer = partial(torch.optim.SGD, lr=1.0)
    task.warmup_steps = 0
    fit(task, module, max_epochs=1, limit_train_batches=1)
    assert [block.ff.price.item() for block in task.model.blocks] == [-0.5, -0.5]


def test_fast_dev_run_is_one_step_of_the_plain_formula_and_has_results(data, fit):
    module = data()
    task = make_task(module, warmup_steps=0)
    task.make_optimizer = partial(torch.optim.SGD, lr=1.0)
    model = copy.deepcopy(task.model)
    x, y = next(iter(module.train_dataloader()))
    (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + fff.aux_loss(model)).backward()
    trainer = fit(task, module, max_epochs=1, fast_dev_run=True)
    assert trainer.global_step == 1
    for parameter, plain in zip(task.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, plain - plain.grad)
    metrics = task.results(module)["metrics"]
    assert metrics["epochs"] == 1 and metrics["test_loss"] > 0


def test_weight_decay_is_that_of_matrices_and_embeddings(data):
    """Biases of experts are matrices, but biases; of deviations from a base `deviation_decay` has the say."""
    module = data()
    make_ff = partial(TREE, base=True, master_width=2)
    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    for options, deviations in (({}, {0.5, 0.0}), ({"deviation_decay": 2.0, "router_lr_factor": 3.0}, {2.0})):
        task = make_task(module, make_ff, depth=1, **options)
        task.make_optimizer = optimizer
        groups = task.build_optimizer().param_groups
        found = {name: group for group in groups for name in group["param_names"]}
        assert {*found} == {name for name, _ in task.model.named_parameters()}
        own = {name: found.pop(f"blocks.0.ff.{name}") for name in ("w_in", "b_in", "w_out", "b_out")}
        assert {group["weight_decay"] for group in own.values()} == deviations
        assert {name for name, group in found.items() if group["weight_decay"] == 0.5} == {
            *("embed.weight", "position", "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"),
            *(f"blocks.0.ff.{name}" for name in ("base_w_in", "base_w_out", "master_w_in", "master_w_out")),
            "blocks.0.ff.node_weight",
        }
        assert all(group["weight_decay"] in (0.0, 0.5) for group in found.values())
        nodes = found["blocks.0.ff.node_weight"], found["blocks.0.ff.node_bias"]
        assert [group["lr"] for group in nodes] == pytest.approx(2 * [0.1 * options.get("router_lr_factor", 1.0)])


@pytest.mark.parametrize("warmup, final", [(0, 0.1), (4, 0.0), (10, 0.5), (30, 0.1)])
def test_the_rate_rises_and_falls(warmup, final):
    rates = [warmup_cosine(warmup, 20, final)(step) for step in range(20)]
    top = min(warmup, 19)
    assert all(0 < later - earlier for earlier, later in zip(rates[:top], rates[1 : top + 1], strict=True))
    assert all(later < earlier for earlier, later in zip(rates[top:-1], rates[top + 1 :], strict=True))
    if warmup < 20:
        assert rates[warmup] == 1.0 and rates[-1] == pytest.approx(final)


@pytest.mark.parametrize(
    "flags, steps",
    [({"limit_train_batches": 4}, 12), ({"limit_train_batches": 7, "accumulate_grad_batches": 3}, 9), ({}, 306)],
)
def test_each_step_has_its_rate(data, fit, flags, steps):
    """The training part of 832 characters has 102 batches of 8 windows."""
    module = data()
    task = make_task(module, fff.NoFeedForward, depth=1, lr=1.0, final_lr=0.25)
    seen = []
    task.on_before_optimizer_step = lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])
    fit(task, module, max_epochs=3, **flags)
    assert len(seen) == steps
    assert seen == pytest.approx([warmup_cosine(2, steps, 0.25)(step) for step in range(steps)])


def test_active_parameters_leave_out_the_leaves_that_a_token_does_not_meet(data):
    dense, tree = (make_task(data(), make_ff).model for make_ff in (DENSE, TREE))
    outside = sum(p.numel() for name, p in dense.named_parameters() if ".ff." not in name)
    assert active_parameters(dense) == outside + 2 * 2 * 16 * 8
    assert active_parameters(tree) == outside + 2 * (2 * 16 * 4 + 2 * 16)  # one leaf of 4 and two nodes


def test_an_epoch_that_is_not_finite_ends_the_run_and_is_never_the_best(data, fit):
    module = data()
    task = make_task(module, lr=math.inf)
    fit(task, module, max_epochs=5, limit_train_batches=3)
    metrics = task.results(module)["metrics"]
    assert metrics["diverged"] and metrics["epochs"] == 1
    assert metrics["val_loss"] is metrics["val_epochs"] is metrics["test_loss"] is None and metrics["num_leaves"] == 8
    assert task.routes(module) is None


@pytest.mark.parametrize("cut", ["epoch=0-step=6", "epoch=1-step=9", "epoch=1-step=12"])
def test_resumed_equals_unbroken(data, fit, tmp_path, cut):
    """An epoch has 6 steps: step 9 lies within the second."""
    when = {"every_n_train_steps": 9} if cut.endswith("9") else {"save_on_train_epoch_end": True}

    def outcome(**options):
        module = data()
        task = make_task(
            module, partial(TREE, drop=0.2), keep_routes=True, schedules={"temperature": [[0, 2.0], [2, 1.0]]}
        )
        saved = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}-{step}", save_top_k=-1, **when)
        fit(task, module, max_epochs=3, limit_train_batches=6, callbacks=[saved], **options)
        found = task.results(module)
        del found["metrics"]["tokens_per_second"]
        return found, task.routes(module)["count"], task.model.state_dict()

    whole, counts, weights = outcome()
    path = tmp_path / "checkpoints" / f"{cut}.ckpt"
    torch.load(path, weights_only=True)
    torch.manual_seed(2)
    resumed, resumed_counts, resumed_weights = outcome(ckpt_path=path)
    assert resumed == whole and np.array_equal(resumed_counts, counts)
    assert all(torch.equal(resumed_weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    "options, named",
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_lr": 1.5}, "final_lr=1.5"),
        ({"router_lr_factor": 0}, "router_lr_factor=0"),
        ({"test": False, "keep_routes": True}, "keep_routes=True"),
    ],
)
def test_bad_arguments_are_named(data, options, named):
    with pytest.raises(ValueError, match=named):
        make_task(data(), **options)


def test_a_run_without_an_epoch_has_no_results(data):
    with pytest.raises(ValueError, match="at least one epoch"):
        make_task(data()).results(data())


@pytest.mark.parametrize(
    "tokens, name",
    [
        ("AEIOU", "upper vowel"),
        ("BYZ", "upper consonant"),
        ("aeiou", "lower vowel"),
        ("byz", "lower consonant"),
        (" ", "space"),
        ("\n", "newline"),
        ("039", "digit"),
        (".,!?'-&$:;", "punctuation"),
        # Of tokenizers.
        ((" of", "in", "a1"), "lower vowel"),
        (("The", " The"), "upper consonant"),
        (("    ",), "space"),
        (("\n\n", " \n"), "newline"),
        ((" 1990",), "digit"),
        (("<|endoftext|>", "\ufffd", ' "'), "punctuation"),
    ],
)
def test_each_token_has_one_class(tokens, name):
    assert {CLASSES[token_class(token)] for token in tokens} == {name}


class ByToken(RoutedLayer):
    """Sends each token to the experts that a table names for its number; -1: to none."""

    in_features = 1

    def __init__(self, table, num_experts=4, tree=None):
        super().__init__()
        self.table, self.num_experts, self.tree = torch.tensor(table), num_experts, tree
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def size(self):
        return Size(0, 0, 0, 0, 0)

    def forward(self, x):
        index = self.table[x.flatten()]
        tree = self.tree and TreeTrace(self.tree, index, torch.zeros(len(index), 2, 3))
        self.record = Record(self.weight * 0, {}, index, self.num_experts, "none", tree)
        return F.one_hot(x, len(self.table)) * 1.0


def test_routes_are_counted_by_class_and_neighbours(data):
    characters = ["a", "b", "\n", "."]
    x = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 3]])
    model = ByToken([[0], [1], [2], [-1]])
    found = measure_text_routes(model, [(x, x), (x[:1], x[:1])], characters)
    expected = np.zeros((8, 4), dtype=int)
    expected[CLASSES.index("lower vowel"), 0] = 4
    expected[CLASSES.index("lower consonant"), 1] = 5
    expected[CLASSES.index("newline"), 2] = 2
    assert np.array_equal(found["count"], expected[None]), "the token without an expert counts nowhere"
    # 3 + 3 pairs that have experts, of which 1 and 2 are of one, and the first row again.
    assert found["repeated"] == pytest.approx([(1 + 2 + 1) / (3 + 2 + 3)])
    assert found["layer"].tolist() == [1] and found["classes"].tolist() == list(CLASSES)
    assert np.isnan(found["shared"]).all() and np.isnan(found["shared_chance"]).all(), "there is no second choice"


def test_neighbours_may_share_a_first_or_second_choice():
    """The order of the two and a third choice do not count; nor does a token that lost one of the two."""
    model = ByToken([[0, 1, 3], [1, 0, 2], [2, 3, 0], [3, -1, 0]], num_experts=5)
    x = torch.tensor([[0, 1, 2, 2, 3, 3]])
    found = measure_text_routes(model, [(x, x), (x[:, :2], x[:, :2])], "abcd")
    assert found["repeated"] == pytest.approx([2 / 6])
    # The pairs of the first row are {0 1}{0 1}, {0 1}{2 3}, {2 3}{2 3}; the second is {0 1}{0 1}.
    assert found["shared"] == pytest.approx([3 / 4])
    # Four tokens have {0 1}, two {2 3}: two drawn at once share one where they are the same.
    assert found["shared_chance"] == pytest.approx([(4 / 6) ** 2 + (2 / 6) ** 2])


def test_even_choices_of_two_of_eight_experts_share_one_by_chance_as_mixtral_says():
    """1 - (6/8) (5/7), below its table 5."""
    sets = [[i, j] for i in range(8) for j in range(8) if i != j]
    x = torch.arange(len(sets))[None]
    found = measure_text_routes(ByToken(sets, num_experts=8), [(x, x)], "a" * len(sets))
    assert found["shared_chance"] == pytest.approx([1 - 6 / 8 * 5 / 7])


def test_of_several_trees_the_leaves_of_the_first_are_counted():
    model = ByToken([[0, 7], [1, 4], [0, 4], [2, 4]], num_experts=8, tree=2)
    x = torch.tensor([[0, 1, 2, 3]])
    found = measure_text_routes(model, [(x, x)], "abcd")
    assert found["count"].shape == (1, 8, 4) and found["count"].sum(1).tolist() == [[2, 1, 1, 0]]
    assert np.isnan(found["shared"]).all(), "the second column is the second tree's first choice"


def test_a_layer_that_sends_every_token_to_all_experts_chooses_nothing():
    x = torch.tensor([[0, 1]])
    assert measure_text_routes(ByToken([[0, 1], [0, 1]], num_experts=2), [(x, x)], "ab") is None
