"""What the figures draw, read back from their axes."""

import numpy as np
import pandas as pd
import pytest

from fff.report import figures


@pytest.fixture(autouse=True)
def _style():
    with figures.style():
        yield


def test_leaf_usage_sorts_each_run_and_averages():
    figure = figures.leaf_usage([("a", [0, 10]), ("a", [5, 5]), ("a", [1, 1, 1, 1]), ("b", [7])], {"a": "#000000"})
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["2 leaves", "4 leaves"]
    # (100 + 50) / 2 and (0 + 50) / 2 percent.
    np.testing.assert_allclose(first.patches[0].get_data().values, [75, 25])


def test_leaf_usage_of_dense_layers_is_no_figure():
    assert figures.leaf_usage([("dense", [10])], {"dense": "#000000"}) is None


def test_entropy_line_ends_where_half_of_the_runs_have_stopped():
    cells = pd.DataFrame({"cell": ["c", "d"], "family": ["FFF", "dense"], "depth": [3.0, float("nan")]})
    history = pd.DataFrame(
        {
            "cell": ["c"] * 3 + ["d"],
            "epoch": [1, 2, 3, 1],
            "runs": [4, 2, 1, 4],
            "node_entropy": [0.6, 0.5, 0.4, np.nan],
        }
    )
    (axes,) = figures.entropy(history, cells).axes
    assert axes.get_title() == "FFF"
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [1, 2])
    assert figures.entropy(history[history["cell"] == "d"], cells) is None


def test_entropy_panels_are_wrapped_and_the_harmless_entropy_is_named():
    cells = pd.DataFrame({"cell": list("abcde"), "family": list("ABCDE"), "depth": [1.0, 2, 3, 4, 5]})
    history = pd.DataFrame({"cell": list("abcde"), "epoch": 1, "runs": 2, "node_entropy": 0.3})
    figure = figures.entropy(history, cells)
    assert [axes.get_title() for axes in figure.axes] == list("ABCDE")
    assert [axes.get_subplotspec().rowspan.start for axes in figure.axes] == [0, 0, 0, 0, 1]
    assert figure.legends[0].get_texts()[-1].get_text().startswith("0.10: ")
    assert all(0.10 in axes.lines[1].get_ydata() for axes in figure.axes)


def test_colors_keep_dense_layers_apart():
    found = figures.colors([("dense", True), ("a", False), ("b", False), ("a", False)])
    assert found == {"dense": figures.DENSE, "a": figures.PALETTE[0], "b": figures.PALETTE[1]}


def test_regions_draw_from_arrays_to_the_same_bytes():
    x = np.linspace(0, 1, 20)
    leaf = np.repeat([[0] * 10 + [3] * 10], 20, axis=0)
    points = np.array([[0.1, 0.2], [0.8, 0.7], [0.5, 0.5]])

    def draw():
        panels = [figures.Regions("hard", leaf, (leaf > 0).astype(int)), figures.Regions("one", 0 * leaf, 0 * leaf)]
        return figures.regions(panels, x, x, points, np.array([0, 1, 1]), num_leaves=4)

    assert [text.get_text() for text in draw().axes[0].texts] == ["0", "3"]
    assert figures.save(draw()) == figures.save(draw())
