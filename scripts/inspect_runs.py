"""python -m scripts.inspect_runs --config config.yaml [--runs.compare "[3, 4]" --runs.metric ap50]

Lists the runs of the experiment log, compares them in a table and a PNG, and shows the best run
with its checkpoint. With --runs.mlflow URI, the runs are also sent to MLflow.
"""

from pathlib import Path

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings, RunsSettings

log = get_log("inspect_runs")


class Settings(CommandSettings):
    runs: RunsSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from rich.console import Console

    from utils.tracking.experiment_log import ExperimentLog
    from utils.tracking.mlflow_export import export_mlflow
    from utils.tracking.run_report import (
        best_run,
        chosen_runs,
        compare_table,
        draw_runs,
        runs_table,
    )
    from warehouse.errors import ConfigError

    runs, where = settings.runs, settings.experiments
    if where.db is None:
        raise ConfigError(
            "no experiment log is named",
            where="experiments.db",
            remedy="give --experiments.db FILE",
        )
    with ExperimentLog(Path(where.db), wait_s=where.wait_s, create=False) as experiments:
        rows = chosen_runs(experiments, runs)
        best = best_run(experiments, rows, runs.metric, runs.better)
        console = Console(stderr=True)
        if not console.is_terminal:
            # A file has no edge at which a table would have to be cut.
            console = Console(stderr=True, width=200)
        console.print(runs_table(experiments, rows, runs.metric, runs.better))
        picture = None
        if rows:
            console.print(compare_table(experiments, rows, runs.better))
            output = Path(runs.output) if runs.output else experiments.path.with_name("compare.png")
            picture = draw_runs(experiments, rows, runs.metric, output)
            log.info("curves: %s", picture)
        sent = export_mlflow(experiments, rows, runs.mlflow) if runs.mlflow else 0
    if best:
        log.info(
            "best: run %d with %s %.4g at step %d; checkpoint: %s",
            best["id"],
            best["metric"],
            best["value"],
            best["step"],
            best["checkpoint"],
        )
    shown = ("id", "trainer", "name", "state", "step", "best", "data_version")
    listed = [{key: value for key, value in row.items() if key in shown} for row in rows]
    return {
        "db": str(experiments.path),
        "runs": listed,
        "best": best,
        "picture": picture and str(picture),
        "exported": sent,
    }


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
