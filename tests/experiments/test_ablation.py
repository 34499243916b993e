"""The experiments of the ablation and its layout know the same questions."""

from pathlib import Path

import pytest

from experiments import sweep
from experiments.config import config_path, identity
from fff.report import records
from fff.report.study import load, report

AXES = sorted(path.stem for path in Path(config_path(), "experiment").glob("ablation_*.yaml"))


@pytest.fixture
def planned(plan, make_config, monkeypatch):
    """Configurations of the runs of one seed, by run id."""
    monkeypatch.setattr(sweep, "check_data", lambda node: None)

    def planned(experiment, *arguments):
        jobs = plan(f"experiment={experiment}", "seed=0", *arguments).jobs
        return {job.run_dir.name: identity(make_config(*job.overrides)) for job in jobs}

    return planned


@pytest.mark.parametrize(("data", "axes"), [("usps", AXES), ("mnist", ["ablation_rate"])])
def test_every_run_belongs_to_a_question(planned, tmp_path, data, axes):
    bases = planned("ablation", f"data={data}")
    assert len(bases) == 2
    for axis in axes:
        configs = planned(axis, f"data={data}")
        rows = [
            records.flatten(
                {"schema": 1, "status": "finished", "study": "ablation", "run_id": run_id, "config_hash": run_id}
                | {
                    "seed": 0,
                    "config": config,
                    "metrics": {"ga": 0.9, "val_accuracy": 0.9, "nodes_below_0.10": 0.1 * i},
                }
            )
            for i, (run_id, config) in enumerate((bases | configs).items())
        ]
        records.write(tmp_path / "runs" / "ablation.csv", records.csv_text(rows, records.columns(rows)))
        titles = [table.title for table in report(load("ablation", tmp_path)).tables]
        assert len(titles) > 1 and not any(", other:" in title for title in titles), (axis, titles)


@pytest.mark.parametrize(("data", "half"), [("usps", 50), ("mnist", 12)])
@pytest.mark.parametrize("axis", ["balance_anneal", "hardening_ramp"])
def test_schedules_end_after_half_of_the_epochs(planned, axis, data, half):
    configs = planned(f"ablation_{axis}", f"data={data}").values()
    points = [points for config in configs for points in config["task"]["schedules"].values()]
    assert len(points) == 4 and {last for _, (last, _) in points} == {half}
