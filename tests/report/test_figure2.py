"""Figure 2: trees stand beside the dense layer of their inference size, recipe and data set."""

from fff.report.study import load, publish
from tests.report.table_text import cells_of

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}


def test_a_tree_is_measured_against_the_dense_layer_of_its_size_and_recipe(write_run, update, results_dir):
    cifar = {"data": "cifar10", "recipe": "cifar", "optimizer": ADAMW}
    write_run("figure2", **cifar, width=4, depth=2, ga=0.40)
    write_run("figure2", **cifar, width=4, depth=6, ga=0.45, leaves_used=30)
    write_run("figure2", **cifar, width=6, ga=0.38)  # 4 + 2 neurons
    write_run("figure2", data="cifar10", recipe="paper_no_hardening", width=10, ga=0.10)  # 4 + 6, by another recipe
    update("figure2")
    published = publish(load("figure2", results_dir))
    place = "CIFAR-10", "our recipe"
    assert cells_of(published.markdown, *place, "FFF, 4 leaves", "6")[2:4] == ["40.0 ± –", "+2.0"]
    assert cells_of(published.markdown, *place, "FFF, 64 leaves", "10")[2:5] == ["45.0 ± –", "–", "30.0 / 64"]
    assert cells_of(published.markdown, *place, "dense", "6")[2:4] == ["38.0 ± –", "–"]
    assert cells_of(published.markdown, "CIFAR-10", "paper's recipe", "dense", "10")[2] == "10.0 ± –"
    assert (results_dir / "figures" / "figure2_cifar10.svg").exists()
