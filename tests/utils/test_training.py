"""The training loop on a model of a few numbers.

Resume, accumulation, ranks, interruption, and its errors.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.tracking.run_log import RunLog
from utils.training.checkpoint import load_checkpoint
from utils.training.loop import Trainer
from utils.training.memory_budget import MemoryBudget
from utils.training.ranks import Ranks, choose_device, to_device
from utils.training.settings import TrainSettings
from utils.training.task import Task, seeded
from warehouse.errors import ConfigError, StateError, TrainingError

ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


class FakeLoader:
    """The ChunkLoader contract on made-up numbers.

    Sample i is a function of i, the order one of (seed, epoch).
    """

    def __init__(self, count=22, batch_size=4, *, rank=0, ranks=1):
        self.count, self.size, self.rank, self.ranks, self.epoch, self.at = (
            count,
            batch_size,
            rank,
            ranks,
            0,
            0,
        )

    def __len__(self):
        return (self.count + self.size * self.ranks - 1) // (self.size * self.ranks)

    def set_epoch(self, epoch):
        self.epoch, self.at = epoch, (self.at if epoch == self.epoch else 0)
        self.at = 0 if self.at >= len(self) else self.at

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]

    def __iter__(self):
        order = np.random.default_rng([7, self.epoch]).permutation(self.count)
        while self.at < len(self):
            start = (self.at * self.ranks + self.rank) * self.size
            index = torch.from_numpy(order[start : start + self.size])
            self.at += 1
            yield {
                "index": index,
                "x": torch.stack([(index * 37 % 11).float(), (index * 13 % 7).float()], dim=1) / 10,
            }


class FakeTask(Task):
    """Fit y = 2 a - b. `on_loss(step)` is called before each batch's loss."""

    name, section, lr = "Fake", "fake", 0.01

    def __init__(self, on_loss=lambda call: None, seed=0):
        with seeded(seed):
            self.model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.on_loss, self.calls = on_loss, 0

    def loss(self, model, batch, epoch):
        self.on_loss(self.calls)
        self.calls += 1
        wanted = 2 * batch["x"][:, :1] - batch["x"][:, 1:]
        error = (model(batch["x"]) - wanted).square().sum()
        return error, {"error": error.detach()}

    def evaluate(self, model, batches):
        return {"score": sum(float(self.loss(model, batch, 0)[0].detach()) for batch in batches)}

    def describe(self):
        return {"kind": "fake"}

    def draw(self, history, path):
        path.write_text(str(len(history)))


def settings(**changes):
    return TrainSettings(
        **{"epochs": 3, "batch_size": 4, "warmup_steps": 3, "lr": 0.01, "device": "cpu"} | changes
    )


def train(output, task=None, loader=None, **changes):
    trainer = Trainer(
        task or FakeTask(),
        settings(**changes),
        loader or FakeLoader(),
        FakeLoader(),
        output,
        ranks=ALONE,
    )
    return trainer.run()


def told(output, kind="step"):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("t_") and key != "seconds"}
        for line in lines
        if line["kind"] == kind
    ]


def weights(output):
    return load_checkpoint(output).tensors


def test_a_run_ends_after_its_epochs_with_a_checkpoint_a_log_and_a_lower_loss(tmp_path):
    result = train(tmp_path, epochs=5)
    steps = told(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert sum(line["samples"] for line in steps) == 5 * 22
    assert result["epochs"] == 5
    assert result["steps"] == 30
    assert len(told(tmp_path, "epoch")) == 5
    assert (tmp_path / "curve.png").read_text() == "5"


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name)
    assert told(tmp_path / "one") == told(tmp_path / "two")
    assert all(
        torch.equal(value, weights(tmp_path / "two")[name])
        for name, value in weights(tmp_path / "one").items()
    )


@pytest.mark.parametrize("stop_at", [0, 1, 4, 5, 6, 11, 13])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_at_any_step_and_resumed_tells_the_losses_of_an_uninterrupted_one(
    tmp_path, stop_at, accumulate
):
    def interrupt(call):
        if call == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    train(tmp_path / "whole", accumulate=accumulate)
    # Evaluation calls the loss too, so that some of these stops fall into it.
    with pytest.raises(KeyboardInterrupt, match=r"--fake\.resume true"):
        train(tmp_path / "parts", FakeTask(interrupt), accumulate=accumulate)
    train(tmp_path / "parts", accumulate=accumulate, resume=True)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")
    assert told(tmp_path / "parts", "epoch") == told(tmp_path / "whole", "epoch")
    assert all(
        torch.equal(value, weights(tmp_path / "parts")[name])
        for name, value in weights(tmp_path / "whole").items()
    )


def test_a_run_stopped_in_its_last_evaluation_is_interrupted_and_not_concluded(tmp_path):
    class Stopped(FakeTask):
        concluded = False

        def evaluate(self, model, batches):
            os.kill(os.getpid(), signal.SIGINT)
            return {"score": 1.0}

        def conclude(self, average):
            self.concluded = True

    class Undisturbed(Stopped):
        evaluate = FakeTask.evaluate

    # Time runs out in the middle of an epoch, so that the run ends with an evaluation.
    stopped, resumed = Stopped(), Undisturbed()
    with pytest.raises(KeyboardInterrupt, match=r"--fake\.resume true"):
        train(tmp_path, stopped, epochs=None, max_minutes=1e-9)
    assert not stopped.concluded
    train(tmp_path, resumed, epochs=None, max_minutes=1e-9, resume=True)
    assert resumed.concluded


def test_a_killed_run_resumes_from_its_last_epoch_and_its_log_tells_no_step_twice(tmp_path):
    class Killed(BaseException):
        pass

    def die(call):
        if call == 15:
            raise Killed

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "parts", FakeTask(die))
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write('{"kind": "step", "st')
    train(tmp_path / "parts", resume=True)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")


def test_accumulated_batches_step_like_one_batch_of_their_size(tmp_path):
    train(tmp_path / "big", loader=FakeLoader(22, 8), batch_size=8)
    train(tmp_path / "small", loader=FakeLoader(22, 4), batch_size=4, accumulate=2)
    for one, two in zip(told(tmp_path / "big"), told(tmp_path / "small"), strict=True):
        assert one["samples"] == two["samples"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_resume_of_another_run_names_the_setting_that_differs(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(StateError, match=r"lr; expected 0\.5, found 0\.01"):
        train(tmp_path, epochs=2, lr=0.5, resume=True)


def test_resume_of_a_finished_run_scores_it_again_and_trains_no_further(tmp_path):
    first = train(tmp_path, epochs=2)
    again = train(tmp_path, epochs=2, resume=True)
    assert again["steps"] == first["steps"]
    assert again["score"] == first["score"]


def test_resume_without_a_checkpoint_starts_anew(tmp_path, caplog):
    assert train(tmp_path, epochs=1, resume=True)["steps"] == 6
    assert "nothing to resume" in caplog.text


def test_minutes_alone_end_a_run_and_anneal_its_rate(tmp_path):
    result = train(tmp_path, epochs=None, max_minutes=0.01, warmup_steps=0)
    rates = [line["lr"] for line in told(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]
    assert 0.5 < result["seconds"] < 5
    assert "score" in result


def test_minutes_or_epochs_must_end_a_run():
    with pytest.raises(ValueError, match="max_minutes"):
        settings(epochs=None)


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_last_checkpoint(tmp_path):
    class Exploding(FakeTask):
        def loss(self, model, batch, epoch):
            total, parts = super().loss(model, batch, epoch)
            return total * (float("nan") if self.calls == 16 else 1.0), parts

    with pytest.raises(TrainingError, match=r"not finite: step \d+.*--fake\.lr"):
        train(tmp_path, Exploding(), status_file=str(tmp_path / "status.json"))
    assert load_checkpoint(tmp_path).meta["counters"]["epoch"] == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_running_out_of_memory_names_the_batch_size_and_a_smaller_one(tmp_path, error):
    def fail(call):
        raise error

    with pytest.raises(
        TrainingError, match=r"batch_size 4; try --fake\.batch_size 2 --fake\.accumulate 2"
    ):
        train(tmp_path, FakeTask(fail))


def on_budget(output, loader=None, **changes):
    budget = MemoryBudget(None, torch.device("cpu"))
    return Trainer(
        FakeTask(),
        settings(**changes),
        loader or FakeLoader(),
        FakeLoader(),
        output,
        ranks=ALONE,
        budget=budget,
    )


@pytest.mark.parametrize("call", [0, 3, 6])
def test_a_batch_whose_upload_runs_out_of_memory_is_trained_on_all_the_same(
    tmp_path, monkeypatch, call
):
    """Of a step's first batch, of its second, and of one in the second epoch."""
    train(tmp_path / "whole", epochs=2, accumulate=2)
    calls = iter(range(1000))

    def upload(batch, device):
        if next(calls) == (
            call if call < 6 else 6 + 6
        ):  # the held-out batches' uploads lie between the epochs
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to_device(batch, device)

    for module in ("run.step", "held_out"):
        monkeypatch.setattr(f"utils.training.{module}.to_device", upload)
    trainer = on_budget(tmp_path / "short", epochs=2, accumulate=2)
    assert trainer.run()["steps"] == 6
    assert trainer.state.micro_batches == 2
    for one, other in zip(told(tmp_path / "short"), told(tmp_path / "whole"), strict=True):
        assert (one["step"], one["samples"]) == (other["step"], other["samples"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_lack_of_memory_in_the_loader_is_not_the_end_of_the_epoch(tmp_path):
    class Starving(FakeLoader):
        def __iter__(self):
            for at, batch in enumerate(super().__iter__()):
                if at == 2:
                    raise MemoryError("in the loader")
                yield batch

    trainer = on_budget(tmp_path, Starving())
    with pytest.raises(MemoryError, match="in the loader"):
        trainer.run()
    assert (trainer.state.step, trainer.state.micro_batches) == (2, 1)


@pytest.mark.parametrize("limit", [None, 10**15])
def test_a_lack_of_memory_in_the_optimizer_s_step_is_an_error_and_the_step_is_not_applied_twice(
    tmp_path, limit
):
    trainer = on_budget(tmp_path)
    trainer.budget.limit = limit
    steps = []

    def step():
        steps.append(trainer.state.step)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    trainer.optimizer.step = step
    remedy = r"raise --fake\.memory_budget_gb, or start anew" if limit else "GiB; start anew"
    with pytest.raises(
        TrainingError,
        match=(
            rf"out of memory in the optimizer's step: step 0; .*{remedy} with "
            r".*--fake\.batch_size"
        ),
    ):
        trainer.run()
    assert (steps, trainer.state.micro_batches) == ([0], 1)


def test_a_resumed_run_that_is_killed_before_its_first_step_keeps_its_log(tmp_path):
    train(tmp_path, epochs=1)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    run_log = RunLog(tmp_path, None, active=True, after_step=4)
    # Read while the log is open: what kill -9 would leave.
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:4]
    run_log.line("step", step=5)
    assert [line["step"] for line in told(tmp_path)] == [1, 2, 3, 4, 5]
    run_log.close()
    assert not list(tmp_path.glob("*.part"))


def test_an_error_of_our_own_is_not_taken_for_a_lack_of_memory(tmp_path):
    def fail(call):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        train(tmp_path, FakeTask(fail))


def test_a_watcher_finds_whole_status_with_the_metrics_at_the_end(tmp_path):
    status = tmp_path / "deep" / "status.json"
    seen = []
    train(
        tmp_path / "out",
        FakeTask(lambda call: status.exists() and seen.append(json.loads(status.read_text()))),
        status_file=str(status),
        log_interval=1,
    )
    last = json.loads(status.read_text())
    assert {one["state"] for one in seen} == {"running"}
    assert last["state"] == "done"
    assert last["step"] == 18
    assert "score" in last


def test_limit_batches_shortens_epochs_and_scoring(tmp_path):
    result = train(tmp_path, epochs=2, limit_batches=2)
    assert result["steps"] == 4


def test_repeats_that_fill_up_a_rank_change_nothing(tmp_path):
    class Padded(FakeLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {key: torch.cat([value, value[:1]]) for key, value in batch.items()} | {
                    "pad": torch.arange(len(batch["index"]) + 1) == len(batch["index"])
                }

    class Careful(FakeTask):
        def loss(self, model, batch, epoch):
            return super().loss(
                model, {"x": batch["x"][~batch["pad"]]} if "pad" in batch else batch, epoch
            )

    train(tmp_path / "plain")
    train(tmp_path / "padded", Careful(), Padded())
    assert told(tmp_path / "plain") == told(tmp_path / "padded")


@pytest.mark.parametrize(("wanted", "match"), [("tpu9", "tpu9"), ("cuda:99", "cuda")])
def test_a_device_that_is_not_there_is_a_typed_error(wanted, match):
    with pytest.raises(ConfigError, match=match):
        Ranks.start(wanted)


@pytest.mark.parametrize(
    ("wanted", "rank", "index"), [("cuda", 0, 0), ("cuda", 3, 1), ("auto", 3, 1), ("cuda:0", 3, 0)]
)
def test_a_gpu_without_a_number_is_this_rank_s(monkeypatch, wanted, rank, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert choose_device(wanted, rank) == torch.device("cuda", index)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="bf16 or float32"):
        train(tmp_path, precision="fp16")


def test_half_precision_trains_too(tmp_path):
    train(tmp_path, precision="bf16", epochs=5)
    assert told(tmp_path)[-1]["loss"] < told(tmp_path)[0]["loss"]


RANK = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_training import FakeLoader, FakeTask, settings
from utils.training.ranks import Ranks
from utils.training.loop import Trainer
ranks = Ranks.start("cpu")
out = Path({out!r})
mine = FakeLoader(24, 2, rank=ranks.rank, ranks=ranks.count)
options = settings(batch_size=2, accumulate={accumulate})
trainer = Trainer(FakeTask(), options, mine, FakeLoader(), out, ranks=ranks)
result = trainer.run()
state = {{"weights": trainer.parts.model.state_dict(), "score": result["score"]}}
torch.save(state, out / f"rank{{ranks.rank}}.pt")
ranks.close()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_gloo_ranks_agree_and_equal_one_process_with_the_same_global_batch(
    tmp_path, accumulate
):
    script = RANK.format(
        root=str(ROOT), tests=str(Path(__file__).parent), out=str(tmp_path), accumulate=accumulate
    )
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one["score"] == two["score"]
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    single = tmp_path / "single"
    train(single, loader=FakeLoader(24, 4), batch_size=4, accumulate=accumulate)
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, weights(single)[f"model.{name}"], rtol=1e-4, atol=1e-5)
    assert [line["loss"] for line in told(tmp_path)] == pytest.approx(
        [line["loss"] for line in told(single)], rel=1e-4
    )
