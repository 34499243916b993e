"""A vision transformer's feedforward layers: sizes of one block, the paper's values, controls of the same recipe."""

import pytest

from fff.report.study import load, publish, report
from tests.report.table_text import cells_of

VIT = {"_target_": "fff.models.VisionTransformer", "depth": 4}
SUMS = ("training_width", "inference_width", "training_size", "inference_size", "num_leaves", "leaves_used")


@pytest.fixture
def write(write_run):
    """The record of a run of four blocks: its sizes and leaves are sums over them."""

    def write(width, depth=None, recipe="paper_vit_5", **options):
        leaves = 2**depth if depth is not None else 1
        sizes = (width * leaves, width, width * leaves + leaves - 1, width + (depth or 0), leaves, leaves)
        sums = {name: 4 * value for name, value in zip(SUMS, sizes, strict=True)}
        options = {"data": "cifar10", "model": VIT, "leaf_load": [10] * 4 * leaves} | sums | options
        write_run("table3", width=width, depth=depth, recipe=recipe, **options)

    return write


@pytest.fixture
def sections(update, results_dir):
    def make():
        update("table3")
        return publish(load("table3", results_dir)).markdown.split("\n## ")[1:]

    return make


def no_layer(write, **options):
    write(0, layer={"_target_": "fff.NoFeedForward"}, leaf_load=[], largest_leaf_share=None, **options)


def test_ours_stand_beside_the_paper_with_the_sizes_of_one_block(write, sections):
    write(128, ga=0.80), write(128, ga=0.82, seed=1)
    write(8, 4, ga=0.70)
    write(8, 4, "paper_vit_10", schedules={"another": 1}, ga=0.72)
    write(8, 4, "ours_vit", schedules={"third": 1}, ga=0.75)
    table = sections()[0]
    # Training size, inference width, inference size; the paper; hardening 5, hardening 10, ours.
    assert cells_of(table, "tree", "8", "128") == ["143", "8", "12", "82.8", "70.0 ± –", "72.0 ± –", "75.0 ± –"]
    # By the paper's recipe dense layers are the same runs, whatever the trees' hardening.
    assert cells_of(table, "dense", "–", "128") == [*("128", "128", "128", "84.7"), *2 * ["81.0 ± 1.4"], "–"]
    # What was not run has the paper's sizes.
    assert cells_of(table, "tree", "1", "128") == ["255", "1", "8", "79.8", "–", "–", "–"]


def test_trees_are_measured_against_dense_layers_and_none_of_their_recipe(write, sections):
    write(8, 4, "paper_vit_10", ga=0.70)
    for width, ga in ((128, 0.80), (12, 0.74), (8, 0.71)):
        write(width, ga=ga)
    no_layer(write, ga=0.65)
    write(128, recipe="ours_vit", optimizer={"_target_": "torch.optim.AdamW"}, ga=0.9)
    dense = sections()[1]
    assert cells_of(dense, "tree", "8", "128", "paper's recipe, h = 10") == [
        *("70.0 ± –", "80.0 ± –", "-10.0", "74.0 ± –", "-4.0", "71.0 ± –", "-1.0", "65.0 ± –", "+5.0")
    ]


def test_mixtures_and_none_have_lines_of_their_own(write, sections):
    write(16, 3)
    for router in ("noisy_top_k", "switch"):
        layer = {"_target_": "fff.MoE", "expert_width": 16, "num_experts": 8, "router": router}
        write(16, 3, layer=layer, ga=0.77, leaves_used=20)
    no_layer(write, ga=0.6)
    beside, _, routing, runs = sections()
    assert cells_of(beside, "mixture (switch)", "16", "128")[-1] == "77.0 ± –"
    assert cells_of(beside, "none", "–", "–")[:3] == ["0", "0", "0"] and beside.index("| none") > beside.index("| mix")
    assert cells_of(routing, "mixture (noisy_top_k)", "16", "128")[1] == "20.0 / 32"
    assert "| none" not in routing and cells_of(runs, "none")[4] == "60.0 ± –"
    assert cells_of(routing, "tree", "16", "128")[-1] == "soft"
    assert cells_of(routing, "mixture (switch)", "16", "128")[-1] == "–"


def test_trees_with_and_without_a_base_stand_side_by_side(write, sections):
    tree = {"_target_": "fff.FFF", "mode": "straight_through", "runner_up": True, "leaf_width": 16, "depth": 3}
    write(16, 3, layer=tree | {"base": True}, ga=0.6)
    write(16, 3, layer=tree, ga=0.5)
    write(128)
    beside, dense, routing, _ = sections()
    assert cells_of(beside, "tree", "16", "128")[-1] == "50.0 ± –"
    assert cells_of(beside, "tree, base", "16", "128")[-1] == "60.0 ± –"
    assert "| tree, base |" in dense
    assert cells_of(routing, "tree, base", "16", "128")[-1] == "straight-through, runner-up"


def test_the_entropy_of_each_block_is_drawn_where_it_was_kept(write, update, results_dir):
    kept = {f"node_entropy_{i}": [0.6, 0.1 * i] for i in range(1, 5)}
    write(8, 4, history={"epoch": [1, 2], **kept})
    write(16, 3)
    update("table3")
    figures = report(load("table3", results_dir)).figures
    assert set(figures) == {"cifar10_size", "cifar10_figure6", "cifar10_leaves"}
    (panel,) = figures["cifar10_figure6"].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines if not line.get_label().startswith("_")}
    assert drawn == {str(i): pytest.approx([0.6, 0.1 * i]) for i in range(1, 5)}
    # Of 16 and of 8 leaves in a block, not of 64 and 32.
    assert [panel.get_title() for panel in figures["cifar10_leaves"].axes] == ["8 leaves", "16 leaves"]


def test_runs_that_have_no_place_are_told_and_two_for_one_place_refused(write, write_run, update, results_dir):
    write(8, 4)
    write_run("table3", data="cifar10", recipe="paper_vit_5", depth=2)
    update("table3")
    assert any("1 runs of no known" in remark for remark in publish(load("table3", results_dir)).remarks)
    write(8, 4, schedules={"another": 1})
    update("table3")
    with pytest.raises(ValueError, match="2 configurations for one place"):
        report(load("table3", results_dir))


def test_other_patches_are_not_set_beside_the_paper(write, sections):
    write(32, depth=2, model={**VIT, "patch_size": 8})
    assert not any("83.6" in table for table in sections())
