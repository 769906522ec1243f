"""The experiment log.

Nothing lost among ten processes, faults typed, training never held up, and runs told apart
afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import ALONE, FakeLoader, FakeTask, settings, told

from scripts import inspect_runs
from scripts._command import run
from utils.tracking.experiment_log import SCHEMA, ExperimentLog
from utils.tracking.experiments import open_run
from utils.tracking.mlflow_export import export_mlflow
from utils.tracking.run_report import best_run
from utils.tracking.settings import ExperimentSettings, RunsSettings
from utils.training.checkpoint import load_checkpoint
from utils.training.loop import Trainer
from warehouse.errors import DatabaseError

ROOT = Path(__file__).parents[2]


class ScoredTask(FakeTask):
    headline = ("score", "min")


def log_settings(tmp_path, **changes):
    return ExperimentSettings(
        **{"db": str(tmp_path / "experiments" / "experiments.db"), "wait_s": 0.2} | changes
    )


def train(tmp_path, output="out", task=None, experiments=None, **changes):
    trainer = Trainer(
        task or ScoredTask(),
        settings(**changes),
        FakeLoader(),
        FakeLoader(),
        tmp_path / output,
        ranks=ALONE,
        experiments=experiments or log_settings(tmp_path),
    )
    return trainer.run()


def read(tmp_path):
    return ExperimentLog(Path(log_settings(tmp_path).db), create=False)


def test_a_trainer_writes_settings_figures_artefacts_versions_and_host(tmp_path):
    train(tmp_path, epochs=3)
    with read(tmp_path) as experiments:
        (row,) = experiments.runs()
        steps, losses, times = experiments.metric(1, "loss", "step")
        assert (row["state"], row["trainer"], row["name"], row["step"]) == (
            "done",
            "fake",
            "Fake",
            18,
        )
        assert row["pid"] == os.getpid()
        assert len(row["code_commit"]) >= 40
        assert json.loads(row["machine"])["torch"]
        assert experiments.params(1)["batch_size"] == 4
        assert experiments.params(1)["model.kind"] == "fake"
        lines = told(tmp_path / "out")
        assert (steps, losses) == (
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
        )
        assert times == sorted(times)
        scores = [line["score"] for line in told(tmp_path / "out", "epoch")]
        assert experiments.metric(1, "score")[1] == scores
        assert row["best"] == min(scores)
        kinds = {artefact["name"]: artefact for artefact in experiments.artefacts(1)}
        assert {"log.jsonl", "checkpoint.json", "best/checkpoint.json"} <= set(kinds)
        assert kinds["log.jsonl"]["bytes"] == (tmp_path / "out" / "log.jsonl").stat().st_size


def test_the_best_checkpoint_is_kept_though_training_goes_on(tmp_path):
    class Worsening(ScoredTask):
        def evaluate(self, model, batches):
            self.scored = [*getattr(self, "scored", []), 0.0]
            return {"score": [3.0, 1.0, 2.0, 4.0][len(self.scored) - 1]}

    train(tmp_path, task=Worsening(), epochs=4)
    kept = tmp_path / "experiments" / "exp_1" / "checkpoints"
    assert load_checkpoint(kept).meta["counters"]["step"] == 12
    assert load_checkpoint(tmp_path / "out").meta["counters"]["step"] == 24
    assert len(list(kept.iterdir())) == 2
    with read(tmp_path) as experiments:
        assert best_run(experiments, experiments.runs(), None) == {
            "id": 1,
            "name": "Fake",
            "metric": "score",
            "value": 1.0,
            "step": 12,
            "checkpoint": str(kept),
        }


@pytest.mark.parametrize("stop_at", [4, 9])
def test_a_resumed_run_goes_on_in_its_entry_and_tells_each_step_once(tmp_path, stop_at):
    def interrupt(call):
        if call == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, task=ScoredTask(interrupt))
    with read(tmp_path) as experiments:
        assert experiments.runs()[0]["state"] == "interrupted"
    train(tmp_path, resume=True)
    with read(tmp_path) as experiments:
        (row,) = experiments.runs()
        assert (row["state"], row["resumed"], row["error"]) == ("done", 1, None)
        assert experiments.metric(1, "loss", "step")[:2] == (
            [line["step"] for line in told(tmp_path / "out")],
            [line["loss"] for line in told(tmp_path / "out")],
        )


def test_a_failed_run_says_why(tmp_path):
    def fail(call):
        if call == 7:
            raise RuntimeError("the cable came loose")

    with pytest.raises(RuntimeError, match="cable"):
        train(tmp_path, task=ScoredTask(fail))
    with read(tmp_path) as experiments:
        assert (experiments.runs()[0]["state"], experiments.runs()[0]["error"]) == (
            "failed",
            "the cable came loose",
        )
        assert experiments.metric(1, "loss", "step")[0] == [1, 2, 3, 4, 5, 6]


def write_much(path, number, steps, ready):
    ready.wait(60)
    with open_run(
        ExperimentSettings(db=path, wait_s=60),
        trainer="many",
        name=f"n{number}",
        params={"number": number},
    ) as one:
        for step in range(1, steps + 1):
            one.log("step", step, {"loss": number + step / 1000, "lr": 0.1})
            if step % 100 == 0:
                one.log("epoch", step, {"loss": float(number)})
                time.sleep(0.01)


def test_ten_processes_at_once_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("fork")
    path, steps, ready = str(tmp_path / "e" / "experiments.db"), 3000, spawn.Barrier(10)
    started = [
        spawn.Process(target=write_much, args=(path, number, steps, ready)) for number in range(10)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
    assert [process.exitcode for process in started] == [0] * 10
    with ExperimentLog(Path(path)) as experiments:
        rows = experiments.runs()
        assert sorted(row["name"] for row in rows) == [f"n{number}" for number in range(10)]
        for row in rows:
            number = experiments.params(row["id"])["number"]
            assert row["name"] == f"n{number}"
            assert row["state"] == "done"
            assert experiments.metric(row["id"], "loss", "step")[:2] == (
                list(range(1, steps + 1)),
                [number + step / 1000 for step in range(1, steps + 1)],
            )
            assert len(experiments.metric(row["id"], "loss")[0]) == steps // 100
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_killed_run_is_lost_and_keeps_what_was_written(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from utils.tracking.experiments import open_run
from utils.tracking.settings import ExperimentSettings
settings = ExperimentSettings(db={str(tmp_path / "e.db")!r})
one = open_run(settings, trainer="t", name="n", params={{}})
one.log("step", 1, {{"loss": 0.5}}); one._flush()
print("written", flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    with ExperimentLog(tmp_path / "e.db") as experiments:
        assert experiments.runs()[0]["state"] == "running"
        process.kill()
        process.wait()
        process.stdout.close()
        assert experiments.runs()[0]["state"] == "lost"
        assert experiments.metric(1, "loss", "step")[:2] == ([1], [0.5])


def test_a_step_costs_less_than_a_tenth_of_a_millisecond(tmp_path):
    figures = dict.fromkeys(
        ("loss", "lr", "cls", "l1", "giou", "t_load", "t_fwd", "t_bwd", "t_opt"), 0.5
    )
    one = open_run(log_settings(tmp_path), trainer="t", name="n", params={})
    # This thread's own time: that of the clock also counts what else the machine is doing.
    start = time.thread_time()
    for step in range(20_000):
        one.log("step", step, dict(figures))
    spent = time.thread_time() - start
    one.finish()
    assert spent / 20_000 < 1e-4
    with read(tmp_path) as experiments:
        assert len(experiments.metric(1, "giou", "step")[0]) == 20_000


def test_numbers_of_any_kind_are_kept_and_others_left_out(tmp_path):
    with open_run(
        log_settings(tmp_path, every=2),
        trainer="t",
        name="n",
        params={"a": {"b": [1, None]}, "c": "x'); DROP TABLE runs; --"},
    ) as one:
        for step in range(1, 5):
            one.log(
                "step",
                step,
                {
                    "loss": float("nan"),
                    "big": float("inf"),
                    "count": 3,
                    "word": "x",
                    "flag": True,
                    "x'; --": 1.0,
                },
            )
    with read(tmp_path) as experiments:
        assert experiments.metric_names(1) == [
            ("step", "big"),
            ("step", "count"),
            ("step", "loss"),
            ("step", "x'; --"),
        ]
        steps, values, _ = experiments.metric(1, "loss", "step")
        assert steps == [2, 4]
        assert values[0] != values[0]
        assert experiments.metric(1, "big", "step")[1] == [float("inf")] * 2
        assert experiments.params(1) == {"a.b": [1, None], "c": "x'); DROP TABLE runs; --"}


def hold(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_log_locked_at_the_start_is_a_typed_error_and_nothing_is_trained(tmp_path):
    train(tmp_path, "first", epochs=1)
    held = hold(log_settings(tmp_path).db)
    with pytest.raises(
        DatabaseError, match=r"locked: .*experiments\.db; found another process .*; wait"
    ):
        train(tmp_path, "second", epochs=1)
    held.close()
    assert not (tmp_path / "second").exists()


def test_a_log_locked_later_is_a_warning_and_training_ends_well(tmp_path, caplog):
    held = []

    def lock(call):
        if call == 3:
            held.append(hold(log_settings(tmp_path).db))

    result = train(tmp_path, task=ScoredTask(lock), epochs=2)
    held[0].close()
    assert result["epochs"] == 2
    assert len(told(tmp_path / "out")) == 12
    assert "locked" in caplog.text
    assert "lines of figures did not get into" in caplog.text


def newer(path):
    with ExperimentLog(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def foreign(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE guests (name TEXT)")
    connection.close()


def changed(path):
    with ExperimentLog(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE params DROP COLUMN value")
    connection.close()


def damaged(path):
    with ExperimentLog(path):
        pass
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(5000)), "not a database"),
        (
            lambda path: path.write_text(
                "just some words, but long enough to be read as a header of something" * 20
            ),
            "not a database",
        ),
        (newer, "newer schema.*expected at most 1, found 99; update"),
        (foreign, "a database of another program, not the experiment log"),
        (changed, "was changed by another program: .*table params"),
        (damaged, "damaged"),
        (lambda path: path.mkdir(), "cannot be used"),
    ],
    ids=["a zip", "a text", "newer", "foreign", "changed", "damaged", "a folder"],
)
def test_what_is_no_log_of_ours_is_refused_by_name_and_left_as_it_is(tmp_path, make, match):
    path = tmp_path / "experiments" / "experiments.db"
    path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(DatabaseError, match=match) as error:
        train(tmp_path, epochs=1)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_typed(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatabaseError, match="folder of the experiment log cannot be made"):
        ExperimentLog(tmp_path / "file" / "e.db")


def test_no_log_is_kept_where_none_is_wanted(tmp_path):
    train(tmp_path, experiments=ExperimentSettings(db=None), epochs=1)
    assert not (tmp_path / "experiments").exists()


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(*argv):
        code = run(
            inspect_runs.main,
            inspect_runs.Settings,
            inspect_runs.__doc__,
            ["--experiments.db", log_settings(tmp_path).db, *argv],
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return call


def test_inspect_runs_lists_compares_draws_and_finds_the_best(tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    train(tmp_path, "slow", epochs=1, lr=0.001)
    train(tmp_path, "fast", epochs=3, lr=0.05)
    code, result, err = command()
    assert code == 0
    assert [row["id"] for row in result["runs"]] == [1, 2]
    assert result["best"]["id"] == 2
    assert Path(result["best"]["checkpoint"], "checkpoint.json").is_file()
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "0.001" in err
    assert "weight_decay" not in err, "what is the same in all runs is left out"
    assert command("--runs.compare", "[1]")[1]["best"]["id"] == 1
    assert command("--runs.metric", "score", "--runs.better", "max")[1]["best"]["id"] == 1
    code, _, err = command("--runs.metric", "map50")
    assert (code, "expected one of epoch, loss, score" in err) == (1, True)
    assert "no run 7" in command("--runs.compare", "[7]")[2]


def test_inspect_runs_without_a_log_says_so_and_makes_none(tmp_path, command):
    code, _, err = command()
    assert code == 1
    assert "there is no experiment log" in err
    assert not (tmp_path / "experiments").exists()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="MLflow is installed")
def test_without_mlflow_the_export_says_what_to_install(tmp_path, command):
    train(tmp_path, epochs=1)
    code, _, err = command("--runs.mlflow", "sqlite:///x.db")
    assert (code, "pip install mlflow-skinny" in err) == (1, True)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="MLflow is not installed")
def test_an_export_to_mlflow_holds_the_same_figures(tmp_path):
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    train(tmp_path, epochs=2)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with read(tmp_path) as experiments:
        assert export_mlflow(experiments, experiments.runs(), uri) == 1
        assert export_mlflow(experiments, experiments.runs(), uri) == 0
        client = MlflowClient(tracking_uri=uri)
        (found,) = client.search_runs([client.get_experiment_by_name("fake").experiment_id])
        assert [
            each.value for each in client.get_metric_history(found.info.run_id, "step/loss")
        ] == experiments.metric(1, "loss", "step")[1]
        assert found.data.params["batch_size"] == "4"


def test_the_schema_in_the_docs_is_the_schema_in_the_file():
    text = (ROOT / "docs" / "experiments.md").read_text()
    for table, columns in SCHEMA.columns().items():
        for column in columns if table != "sqlite_sequence" else ():
            assert f"`{column}`" in text, f"{table}.{column} is not documented"


def test_runs_settings_are_strict():
    with pytest.raises(ValueError, match="better"):
        RunsSettings(better="larger")
