"""The report of the benchmarks, from rows made up for the purpose."""

import numpy as np
import pandas as pd
import pytest

from experiments import tables
from fff.report.studies import bench
from fff.report.study import StudyData, headline, load, publish

PLACE = {
    "cpu": "made up",
    "gpu": None,
    "cores": 2,
    "torch": "0",
    "python": "0",
    "fastfeedforward": None,
    "git_commit": "c",
}


def row(suite, case, candidate, depth, batch, median, **fields):
    return {
        **{"suite": suite, "case": case, "candidate": candidate, "backend": None, "dtype": "float32", "threads": 1},
        **{"depth": depth, "batch": batch, "agrees": True, "median_s": median, "low_s": median, "high_s": median},
        **{
            "floor_s": median and median / 4,
            "floor_kind": "memory",
            "floor_share": 0.25,
            "least_flops": 1e6 * 2 ** (depth or 0),
        },
        **{"least_bytes": 1e5, "matmul_rate": 1e11, "bandwidth": 1e10, "peak_bytes": 2**20, "seed": 0},
        **PLACE,
        **fields,
    }


def ratio(median, met, **bounds):
    of = {"suite": "inference", "case": "grid_depth2_batch1", "quantity": "time", "of": "dense", "over": "fff_native"}
    return {
        **of,
        "median": median,
        "low": median,
        "high": median,
        "at_least": None,
        "at_most": None,
        "met": met,
        **bounds,
    }


@pytest.fixture
def results(tmp_path):
    rows = [
        row("inference", f"grid_depth{depth}_batch{batch}", name, depth, batch, median)
        for depth in (2, 3)
        for batch in (1, 8)
        for name, median in (("fff_native", 1e-3), ("dense", 1e-3 * depth * batch), ("upstream", 0.5))
    ]
    # One that was refused has no time, and is in no table.
    rows.append(row("inference", "grid_depth2_batch1", "gather_bmm", 2, 1, None, agrees=False))
    rows.append(row("inference", "bfloat16_batch8", "fff_native", 3, 8, 9.0, dtype="bfloat16"))
    ratios = [ratio(2.0, False, at_least=4.0), ratio(2.0, True, at_most=4.0)]
    ratios.append(ratio(23.0, None, case="grid_depth3_batch8"))
    # A suite without sizes: its columns must not turn those of others into fractions.
    overhead = [row("overhead", "trainer", "trainer", None, None, 1.0)]
    scaling = [
        row("scaling", "s", name, depth, 8, 1e-3 * depth) for depth in (1, 2) for name in ("fff_native", "dense")
    ]
    folder = tmp_path / "bench"
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "inference.csv", index=False)
    pd.DataFrame(ratios).to_csv(folder / "inference.ratios.csv", index=False)
    pd.DataFrame(scaling).to_csv(folder / "scaling.csv", index=False)
    pd.DataFrame(overhead).to_csv(folder / "overhead.csv", index=False)
    return tmp_path


def test_speed_ups_are_those_of_the_rows(results):
    made = bench.report(StudyData("bench", pd.DataFrame(), pd.DataFrame(), results))
    first = made.tables[0].frame
    assert list(first["depth"]) == ["2", "2", "3", "3"] and list(first["batch"]) == ["1", "8", "1", "8"]
    # The last is that of the same rounds, where the quotient of the medians is 24.
    assert list(first["dense, training width"]) == ["2x", "16x", "3x", "23x"]
    assert set(first["authors' package"]) == {"500x"} and set(first["of the floor"]) == {"25 %"}
    assert "gather + bmm" not in first and "made up" in made.tables[0].note
    targets = made.tables[-1].frame
    assert list(targets["met"]) == ["missed", "yes"] and list(targets["target"]) == [">= 4", "<= 4"]
    assert set(made.figures) == {"scaling", "speedup", "roofline"}
    (speedups,) = made.figures["speedup"].axes
    assert [text.get_text() for text in speedups.texts] == list(first["dense, training width"])
    absent = ("latency", "training", "routing", "memory", "crossover")
    assert list(made.remarks) == [f"bench: no rows of suite={suite}" for suite in absent]


def test_same_rows_same_bytes(results):
    def written():
        publish(load("bench", results))
        return {path: path.read_bytes() for path in sorted(results.rglob("*")) if path.is_file()}

    first = written()
    assert any(path.suffix == ".svg" for path in first)
    np.random.rand(3)
    assert written() == first


def test_front_page_tells_the_headline_of_the_committed_results(results, tmp_path, monkeypatch, capsys):
    page = tmp_path / "front.md"
    page.write_text("before\n<!-- generated: begin -->\nold\n<!-- generated: end -->\nafter\n")
    monkeypatch.setattr(tables, "FRONT_PAGE", page)
    assert tables.main(["bench", "--results-dir", str(results), "--runs-dir", str(tmp_path / "none")]) == 0
    assert "old" in page.read_text()  # the results of somebody else
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.main(["bench", "--results-dir", str(results), "--runs-dir", str(tmp_path / "none")]) == 0
    text = page.read_text()
    assert "| 3     | 8     |" in text and "23x" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n")


def test_a_gpu_has_tables_of_its_own(results):
    """And those of the CPU stay what they are."""
    study = StudyData("bench", pd.DataFrame(), pd.DataFrame(), results)
    before = {table.name: table for table in bench.report(study).tables}
    assert not any(name.startswith("bench_gpu") for name in before)
    on = {"gpu": "made-up card", "dtype": "bfloat16", "matmul_rate": 8e14, "bandwidth": 4e12}
    refused = {**on, "agrees": False, "dtype": None, "matmul_rate": None, "bandwidth": None, "peak_bytes": None}

    def rows(case, size, times):
        sizes = {"num_experts": 32} if case.startswith("dispatch") else {}
        made = [row("inference_cuda", case, name, size, 8, median, **on, **sizes) for name, median in times.items()]
        return [entry | ({} if entry["median_s"] else refused) for entry in made]

    inference = [
        *rows("layer_batch8_depth5", 5, {"fff": 1e-4, "fff_graph": 5e-5, "dense": 4e-4, "dense_graph": 4e-4}),
        *rows("deep_batch_batch8_depth15", 15, {"fff": None, "fff_graph": 2e-3}),
        *rows("dispatch_batch8_num_experts32", None, {"triton": 1e-5, "triton_graph": 5e-6, "grouped": 3e-4}),
        *rows("routing_batch8_depth3", 3, {"descend": 1e-5, "descend_graph": 4e-6, "gate": 2e-5, "gate_graph": 6e-6}),
    ]
    training = [
        row("training_cuda", "step_depth8", "fff", 8, 8, 1e-3, **on),
        row("training_cuda", "step_depth8", "dense", 8, 8, None, **refused),
    ]
    compiled = {"fff_compiled": 1e-4, "fff_compiled_graph": 2e-5, "dense_compiled": 3e-4, "dense_compiled_graph": 1e-4}
    inference += rows("compiled_batch8_depth5", 5, compiled)
    tiles = {"triton_graph": 2e-5, "triton_tiles16x64x4x3_graph": 3e-5, "triton_tiles64x64x4x3_graph": None}
    crossover = [
        *rows("tiles_num_experts32", None, tiles),
        *rows("tiles_training_depth8", 8, {"fff_graph": 7e-4, "fff_tiles16x64x4x3_graph": 8e-4}),
        *rows("levels_depth8_batch8", 8, {"descend_graph": 5e-6, "descend_levels0_graph": 6e-6}),
        *rows("levels_depth9_batch8", 9, {"descend_graph": 7e-6, "descend_levels0_graph": 8e-6}),
    ]
    unmeasured = ratio(None, None, at_least=3.0) | {"suite": "inference_cuda", "of": "dense", "over": "fff"}
    folder = results / "bench"
    pd.DataFrame(inference).to_csv(folder / "inference_cuda.csv", index=False)
    pd.DataFrame(training).to_csv(folder / "training_cuda.csv", index=False)
    of_crossover = [entry | {"suite": "crossover_cuda"} for entry in crossover]
    pd.DataFrame(of_crossover).to_csv(folder / "crossover_cuda.csv", index=False)
    paired = unmeasured | {
        "case": "compiled_batch8_depth5",
        "of": "dense_compiled",
        "over": "fff_compiled",
        "median": 2.5,
    }
    other = paired | {"over": "dense", "median": 9.0}
    ratios = pd.DataFrame([unmeasured, paired | {"at_least": None}, other | {"at_least": None}])
    ratios.to_csv(folder / "inference_cuda.ratios.csv", index=False)
    after = {table.name: table for table in bench.report(study).tables}
    for name in set(before) - {"bench_targets"}:
        pd.testing.assert_frame_equal(before[name].frame, after[name].frame)
        assert before[name].note == after[name].note
    layer, steps = after["bench_gpu"].frame, after["bench_gpu_training"].frame
    assert list(layer["depth"]) == ["5", "15"] and list(layer["ours, us"]) == ["100", "–"]
    assert list(layer["dense, training width"]) == ["4x", "–"]
    assert list(layer["the same, both as graphs"]) == ["8x", "–"]
    assert list(layer["as a graph, us"]) == ["50", "2,000"] and set(layer["graph, of the floor"]) == {"25 %"}
    assert "made-up card" in after["bench_gpu"].note and "4 TB/s" in after["bench_gpu"].note
    assert list(after["bench_gpu_dispatch"].frame["ours in PyTorch"]) == ["30x"]
    assert list(after["bench_gpu_routing"].frame["flat gate"]) == ["2x"]
    assert list(steps["step, ms"]) == ["1", "–"] and list(steps["peak, MiB"]) == ["1", "–"]
    assert list(after["bench_gpu_step"].frame["ours, us"]) == ["1,000"]
    compiled = after["bench_gpu_compiled"].frame
    # The median of paired rounds, where there is one, and that over ours alone; else the ratio of medians, which is 3.
    assert list(compiled["dense, training width"]) == ["2.5x"] and list(compiled["the same, both as graphs"]) == ["5x"]
    # The longer list goes down; names of ours and theirs without what they share.
    tiles, levels = after["bench_gpu_tiles"].frame, after["bench_gpu_levels"].frame
    assert list(tiles[""]) == ["by itself", "tiles16x64x4x3", "tiles64x64x4x3"]
    assert list(tiles["tiles_num_experts32"]) == ["20", "30", "refused"]
    assert list(tiles["tiles_training_depth8"]) == ["700", "800", "–"]
    assert list(levels[""]) == ["levels_depth8_batch8", "levels_depth9_batch8"]
    assert list(levels["by itself"]) == ["5", "7"] and list(levels["levels0"]) == ["6", "8"]
    assert "crossover_cuda" not in set(bench.report(study).cells["suite"])  # too many
    assert list(after["bench_targets"].frame["met"]) == ["missed", "yes", "not measured"]


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="experiments.bench"):
        bench.report(StudyData("bench", pd.DataFrame(), pd.DataFrame(), tmp_path))


def test_choices_are_summed_up(tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    sizes = {"gradient": False, "num_experts": 4, "routes": "zipf"}
    rows = [
        row("crossover", "inference_batch8", "auto", None, 8, 1e-3),
        row("routing", "inference_zipf", "auto", None, 8, 2e-3, **sizes | {"backend": "grouped"}),
        row("routing", "inference_zipf", "dense", None, 8, 3e-3, **sizes),
        row("routing", "inference_even", "auto", None, 8, 4e-3, **sizes | {"gradient": None, "routes": "uniform"}),
        row("memory", "training_depth3_batch8", "fff_soft", 3, 8, 1.0, peak_bytes=3 * 2**20),
    ]
    made_up = {"suite": "crossover", "of": "auto", "over": "dense", "at_most": 1.3}
    ratios = [
        ratio(1.1, True, **made_up, case="inference_batch8"),
        ratio(1.7, False, **made_up, case="inference_batch9"),
        ratio(1.2, True, **made_up, case="training_batch8"),
    ]
    for suite in ("crossover", "routing", "memory"):
        pd.DataFrame([r for r in rows if r["suite"] == suite]).to_csv(folder / f"{suite}.csv", index=False)
    pd.DataFrame(ratios).to_csv(folder / "crossover.ratios.csv", index=False)
    tables = {t.name: t.frame for t in bench.report(StudyData("b", pd.DataFrame(), pd.DataFrame(), tmp_path)).tables}
    choice = tables["bench_crossover"]
    assert list(choice["within 1.3"]) == ["1", "1"] and list(choice["cases"]) == ["2", "1"]
    assert list(choice["worst case"]) == ["batch9, where dense is best", "batch8, where dense is best"]
    routing = tables["bench_routing"].iloc[0]
    assert (routing["auto took"], routing["auto"], routing["dense"]) == ("grouped", "2", "3")
    assert list(tables["bench_routing"][""]) == ["inference", "inference"]
    assert list(tables["bench_memory"]["fff soft"]) == ["3"]
    assert tables["bench_targets"].empty


def test_a_headline_is_the_first_table_and_others_by_title():
    markdown = "# bench\n\n## A\n\na\n\n## B\n\nb\n\n## C\n\nc\n"
    assert headline(markdown) == "**A**\n\na\n"
    assert headline(markdown, "C", "absent") == "**A**\n\na\n\n**C**\n\nc\n"
