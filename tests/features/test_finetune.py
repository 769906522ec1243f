"""Fine-tuning: what is trained and how fast, resume, budgets of time and memory."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from finetune_fakes import (
    CLASSES,
    TARGETS,
    FakeLoader,
    Quick,
    make_task,
    make_trainer,
    settings,
    told,
    toy_encoder,
)
from torch.nn import functional

from features.finetuning.augmentation import augment_pictures
from features.finetuning.finetune_net import trained_levels
from features.finetuning.finetune_task import FinetuneTask
from features.finetuning.settings import FinetuneSettings, FinetuneTraining
from features.image_labels import picture_targets
from utils.training.checkpoint import load_checkpoint
from utils.training.memory_budget import MemoryBudget, OverBudget, training_bytes
from warehouse import Warehouse
from warehouse.errors import ConfigError, StateError, TrainingError

STEPS = 15
"""Of a whole run: 3 epochs of 9 batches, two a step."""


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "training").tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = make_trainer(folder).run()
    assert result["finished"]
    assert result["steps"] == STEPS
    return folder


def same_run(one: Path, other: Path) -> None:
    for kind in ("step", "epoch", "held_out"):
        assert told(one, kind) == told(other, kind)
    for part in (one, one / "training"):
        first, second = (
            load_checkpoint(part).tensors,
            load_checkpoint(other / part.relative_to(one)).tensors,
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_learns_and_tells_figures_of_the_split_that_decided_nothing(tmp_path):
    changes = {
        "epochs": 10,
        "blocks": None,
        "norms": "trained",
        "backbone_rate": 1.0,
        "accumulate": 1,
        "rotate": 0,
        "zoom": 0,
    }
    result = make_trainer(tmp_path, make_task(tmp_path, FinetuneTask, **changes), **changes).run()
    assert result["accuracy"] >= 0.9
    best = load_checkpoint(tmp_path).meta["best"]
    assert (result["selection_accuracy"], result["best_epoch"]) == (best["accuracy"], best["epoch"])
    epochs = told(tmp_path, "epoch")
    assert best["accuracy"] == max(line["accuracy"] for line in epochs)
    assert best["epoch"] == max(
        line["epoch"] for line in epochs if line["accuracy"] == best["accuracy"]
    ), "the last of equals"
    for path in (tmp_path / "confusion.png", tmp_path / "training" / "curve.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert told(tmp_path, "held_out")[-1]["accuracy"] == result["accuracy"]


# Calls of the loss: 9 an epoch; in the head's epoch, at its end, in the next, in the last.
@pytest.mark.parametrize("stop_at", [0, 3, 8, 9, 13, 26])
def test_a_run_stopped_at_any_step_and_resumed_is_the_uninterrupted_one(tmp_path, whole, stop_at):
    class Stopped(Quick):
        def on_loss(self, call):
            if call == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="the same command"):
        make_trainer(tmp_path, make_task(tmp_path, Stopped)).run()
    make_trainer(tmp_path).run()
    same_run(tmp_path, whole)


def test_a_session_out_of_minutes_ends_well_and_the_same_command_goes_on(tmp_path, whole, caplog):
    caplog.set_level(logging.INFO)
    sessions = []
    while not sessions or not sessions[-1]["finished"]:
        sessions.append(make_trainer(tmp_path, max_minutes=1e-9).run())
    assert len(sessions) == STEPS, "a session does one step at least"
    assert caplog.text.count("minutes are over") == STEPS - 1
    assert caplog.text.count("continue with the same command") == STEPS - 1
    same_run(tmp_path, whole)


@pytest.mark.parametrize("die_at", [5, 20])
def test_a_killed_run_loses_only_the_steps_since_its_last_checkpoint(tmp_path, whole, die_at):
    class Killed(BaseException):
        pass

    class Dying(Quick):
        def on_loss(self, call):
            if call == die_at:
                raise Killed

    with pytest.raises(Killed):
        make_trainer(tmp_path, make_task(tmp_path, Dying)).run()
    done = die_at // 9 * 5 + die_at % 9 // 2
    assert done - 2 < load_checkpoint(tmp_path / "training").meta["counters"]["step"] <= done
    make_trainer(tmp_path).run()
    same_run(tmp_path, whole)


def test_a_resume_with_other_settings_names_what_differs(tmp_path):
    make_trainer(tmp_path, epochs=2).run()
    with pytest.raises(StateError, match=r"backbone_rate.*--finetune\.output"):
        make_trainer(tmp_path, epochs=2, backbone_rate=0.25).run()
    with pytest.raises(StateError, match="weights_sha256"):
        make_trainer(
            tmp_path, make_task(tmp_path, encoder=toy_encoder(seed=1), epochs=2), epochs=2
        ).run()


@pytest.mark.parametrize("norms", ["frozen", "trained"])
def test_what_is_frozen_stays_as_it_was_bit_for_bit(tmp_path, norms):
    before = {name: value.clone() for name, value in toy_encoder().network.state_dict().items()}
    make_trainer(tmp_path, make_task(tmp_path, blocks=1, norms=norms), blocks=1, norms=norms).run()
    tensors = state(tmp_path)
    for part in ("model", "average"):
        for name, value in before.items():
            moved = not torch.equal(value, tensors[f"{part}.network.{name}"])
            statistics = "running" in name or "batches" in name
            assert moved == (
                name.startswith(("blocks.2", "top")) and (norms == "trained" or not statistics)
            ), name


def test_in_the_head_s_epochs_nothing_but_the_head_learns(tmp_path):
    make_trainer(
        tmp_path, make_task(tmp_path, epochs=2), epochs=2, max_minutes=None, limit_batches=None
    )
    task = make_task(tmp_path)
    batch = next(iter(FakeLoader("train")))
    for epoch, learns in ((0, False), (1, True)):
        task.before_epoch(epoch)
        task.model.zero_grad(set_to_none=True)
        task.loss(task.model.train(), batch, epoch)[0].backward()
        assert task.model.head.weight.grad is not None
        assert [parameter.grad is not None for parameter in task.tuned] == [learns] * len(
            task.tuned
        )


def test_earlier_blocks_learn_slower_by_their_distance_from_the_end(tmp_path):
    task = make_task(
        tmp_path,
        blocks=None,
        backbone_rate=0.5,
        block_decay=0.1,
        epochs=2,
        head_epochs=0,
        weight_decay=0.0,
    )
    trainer = make_trainer(
        tmp_path,
        task,
        blocks=None,
        backbone_rate=0.5,
        block_decay=0.1,
        epochs=2,
        head_epochs=0,
        weight_decay=0.0,
        warmup_steps=0,
        average=0.0,
        max_minutes=1e-9,
    )
    before = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    trainer.run()
    # Adam's first step is the learning rate for every weight that has a gradient.
    step = {
        name: float((value.detach() - before[name]).abs().max())
        for name, value in task.model.named_parameters()
    }
    for name, share in {
        "head.weight": 1,
        "network.top.weight": 0.5,
        "network.blocks.2.0.weight": 0.5,
        "network.blocks.1.0.weight": 0.05,
        "network.blocks.0.0.weight": 0.005,
        "network.stem.weight": 0.0005,
    }.items():
        assert step[name] == pytest.approx(0.02 * share, rel=2e-2), name


def test_blocks_are_counted_from_the_end_and_too_many_are_an_error_that_names_their_number():
    encoder = toy_encoder()
    names = {id(value): name for name, value in encoder.network.named_parameters()}
    assert [[names[id(value)] for value in level][:1] for level in trained_levels(encoder, 2)] == [
        ["blocks.2.0.weight"],
        ["blocks.1.0.weight"],
        [],
    ]
    assert sum(map(len, trained_levels(encoder, None))) == len(names)
    with pytest.raises(ConfigError, match="expected 1 to 3, found 4"):
        trained_levels(encoder, 4)


class Scripted:
    """A meter that tells made-up peaks, one a reading after each reset."""

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.trimmed, self.fresh = list(peaks), 0, False

    def reset(self) -> None:
        self.fresh = True

    def now(self) -> int:
        return 0

    def peak(self) -> int:
        if self.fresh:
            self.fresh = False
            return self.peaks.pop(0) if self.peaks else 0
        return 0

    def trim(self) -> None:
        self.trimmed += 1


def test_an_overrun_is_answered_once_by_halves_that_give_the_same_steps(tmp_path, whole, caplog):
    meter = Scripted(0, 0, 0, 10**10)
    budget = MemoryBudget(4.0, torch.device("cpu"), meter)
    trainer = make_trainer(tmp_path, budget=budget)
    trainer.run()
    assert caplog.text.count("over the memory budget at step 1") == 1
    assert "2 samples at a time" in caplog.text
    assert (trainer.state.micro_batches, meter.trimmed, budget.peak_gb) == (2, 1, 10.0)
    for one, other in zip(told(tmp_path), told(whole), strict=True):
        assert (one["step"], one["samples"], one["lr"]) == (
            other["step"],
            other["samples"],
            other["lr"],
        )
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    # What a resumed session starts with.
    again = make_trainer(
        tmp_path, budget=MemoryBudget(4.0, torch.device("cpu"), Scripted()), epochs=4
    )
    again.run()
    assert again.state.micro_batches == 2


def test_the_gradient_of_halves_is_that_of_the_whole_batch_by_definition(tmp_path):
    """Against cross-entropy written out over both batches of the step, through a copy of the
    network.
    """
    changes = {
        "head_epochs": 0,
        "label_smoothing": 0.0,
        "zoom": 0,
        "shift": 0,
        "rotate": 0,
        "contrast": 0,
        "brightness": 0,
        "flip_x": 0,
        "blocks": None,
        "clip_norm": 1e9,
    }
    task = make_task(tmp_path, **changes)
    batches = [batch for batch, _ in zip(FakeLoader("train"), range(2), strict=False)]
    oracle = make_task(tmp_path, **changes).model.eval().requires_grad_(True)
    images, index = (torch.cat([batch[key] for batch in batches]) for key in ("image", "index"))
    chance = oracle(images.float() / 255).softmax(dim=1)[torch.arange(8), TARGETS["train"][index]]
    (-chance.log().sum() / 8).backward()
    seen = {}

    class Stop(Exception):
        pass

    trainer = make_trainer(
        tmp_path,
        task,
        budget=MemoryBudget(4.0, torch.device("cpu"), Scripted(0, 10**10)),
        **changes,
    )

    def spy(max_norm=None):
        seen.update({name: value.grad.clone() for name, value in task.model.named_parameters()})
        raise Stop

    trainer.scaler.step = lambda optimizer: spy()
    with pytest.raises(Stop):
        trainer.run()
    assert trainer.state.micro_batches == 2
    for name, value in oracle.named_parameters():
        torch.testing.assert_close(seen[name], value.grad, rtol=1e-3, atol=1e-6)


def test_a_second_overrun_and_one_of_single_samples_are_errors_that_say_what_to_do(tmp_path):
    budget = MemoryBudget(4.0, torch.device("cpu"), Scripted(10**10, 10**10))
    with pytest.raises(
        TrainingError,
        match=(
            r"over the memory budget: step 0, 2 at a time; found 10\.00 GB; raise "
            r"--finetune\.memory_budget_gb"
        ),
    ):
        make_trainer(tmp_path / "halves", budget=budget).run()
    budget = MemoryBudget(4.0, torch.device("cpu"), Scripted(10**10))
    with pytest.raises(TrainingError, match="1 at a time"):
        make_trainer(tmp_path / "ones", budget=budget, batch_size=1).run()


def test_a_real_overrun_on_the_cpu_is_seen_and_halves_go_on_within_the_budget(tmp_path, caplog):
    """The peak of whole batches and of halves is measured first.

    A limit between them must be kept by halving.
    """

    class Hungry(Quick):
        """Holds 16 MB a sample: blocks so large that malloc asks the system for each."""

        def loss(self, model, batch, epoch):
            held = torch.ones(len(batch["index"]), 4_000_000)
            total, parts = super().loss(model, batch, epoch)
            return total + 0 * held.sum(), parts

    changes = {"epochs": 1, "head_epochs": 0, "batch_size": 18, "accumulate": 1}

    def run(folder, limit, pieces):
        budget = MemoryBudget(limit, torch.device("cpu"))
        trainer = make_trainer(
            tmp_path / folder,
            make_task(tmp_path / folder, Hungry, **changes),
            budget=budget,
            **changes,
        )
        trainer.state.micro_batches = pieces
        budget.meter.trim()
        budget.meter.reset()
        budget.highest = 0
        trainer.run()
        return trainer, budget

    large, small = (run(f"free{pieces}", None, pieces)[1].peak_gb for pieces in (1, 2))
    assert large > small + 0.1, "288 MB against 144"
    trainer, budget = run("limited", (large + small) / 2, 1)
    assert trainer.state.micro_batches == 2
    assert "over the memory budget at step 0" in caplog.text
    assert budget.peak_gb > (large + small) / 2, "the peak is told, the over-run's too"
    with pytest.raises(TrainingError, match="over the memory budget"):
        run("too_little", small - 0.05, 1)


def test_a_batch_of_one_moves_no_statistics(tmp_path):
    """Pictures shrunk to one cell: a batch norm over a single value would be an error."""
    encoder = toy_encoder(size=2)
    task = make_task(tmp_path, encoder=encoder, norms="trained", head_epochs=0)
    task.before_epoch(0)
    batch = next(iter(FakeLoader("train")))
    for count, moves in ((1, False), (4, True)):
        before = encoder.network.blocks[2][1].running_mean.clone()
        task.loss(task.model.train(), {key: value[:count] for key, value in batch.items()}, 0)[
            0
        ].backward()
        assert torch.equal(before, encoder.network.blocks[2][1].running_mean) != moves


def test_a_budget_below_the_model_s_own_size_is_an_error_before_any_step(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"below the model's own size: finetune\.memory_budget_gb; expected at least \d",
    ):
        make_trainer(tmp_path, budget=MemoryBudget(0.01, torch.device("cpu"))).run()
    assert not (tmp_path / "training").exists()
    task = make_task(tmp_path, blocks=1)
    held, coming = training_bytes(task.model, task.groups(0.0))
    own = 4 * sum(value.numel() for value in task.model.parameters())
    assert own < held / 2 <= own + 4 * 60, (
        "weights and their average; the norms' statistics are a few numbers more"
    )
    assert coming == 3 * 4 * (8 * 8 * 9 + 16 + 8 * 8 + 8 + 16 + 8 * CLASSES + CLASSES), (
        "block, top, layer norm, head"
    )


def test_the_process_is_what_is_watched_on_a_cpu():
    budget = MemoryBudget(None, torch.device("cpu"))
    floor = budget.meter.now()
    with budget.watch():
        held = torch.ones(60_000_000)  # 240 MB
    assert budget.highest > floor + 200_000_000
    del held
    limited = MemoryBudget((budget.meter.now() + 100e6) / 1e9, torch.device("cpu"))
    with pytest.raises(OverBudget), limited.watch():
        torch.ones(60_000_000)


def test_forgotten_activations_change_no_step(tmp_path, whole):
    make_trainer(tmp_path, make_task(tmp_path, save_memory=True)).run()
    same_run(tmp_path, whole)
    with pytest.raises(ConfigError, match=r"norms frozen"):
        make_task(tmp_path, save_memory=True, norms="trained")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head_epochs": 10}, "fewer than epochs"),
        ({"recompute": True, "norms": "trained"}, "twice"),
        ({"blocks": 0}, "blocks"),
        ({"memory_budget_gb": 0}, "memory_budget_gb"),
        ({"epochs": None}, "max_minutes"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        FinetuneSettings(**change)
    assert FinetuneSettings().training().output == "checkpoints/finetune/training"


PLAIN = {
    "flip_x": 0,
    "flip_y": 0,
    "zoom": 0,
    "shift": 0,
    "rotate": 0,
    "contrast": 0,
    "brightness": 0,
}


def test_augmentation_is_a_function_of_seed_epoch_and_sample_not_of_the_batch():
    pictures, index = (
        torch.rand(5, 3, 16, 20, generator=torch.Generator().manual_seed(0)),
        torch.tensor([4, 0, 9, 2, 7]),
    )
    both = augment_pictures(pictures, index, 3, FinetuneTraining())
    torch.testing.assert_close(
        augment_pictures(pictures[2:3], index[2:3], 3, FinetuneTraining())[0], both[2]
    )
    assert not torch.equal(augment_pictures(pictures, index, 4, FinetuneTraining()), both)
    assert not torch.equal(augment_pictures(pictures, index, 3, FinetuneTraining(seed=1)), both)
    assert 0 <= float(both.min()) <= float(both.max()) <= 1
    assert torch.equal(augment_pictures(pictures, index, 3, FinetuneTraining(**PLAIN)), pictures)


@pytest.mark.parametrize(("change", "axis"), [({"flip_x": 1.0}, -1), ({"flip_y": 1.0}, -2)])
def test_a_flip_is_a_flip_and_the_borders_are_repeated(change, axis):
    pictures = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    said = augment_pictures(pictures, torch.arange(2), 0, FinetuneTraining(**PLAIN | change))
    torch.testing.assert_close(said, pictures.flip(axis), atol=1e-5, rtol=1e-5)
    flat = augment_pictures(
        torch.full((3, 3, 12, 12), 0.4),
        torch.arange(3),
        0,
        FinetuneTraining(**PLAIN | {"rotate": 90, "zoom": 0.5}),
    )
    torch.testing.assert_close(flat, torch.full_like(flat, 0.4))


def test_rotation_keeps_shapes_on_pictures_that_are_not_square():
    """A disc stays a disc of the same area and centre when it is turned."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(96.0), indexing="ij")
    disc = ((y - 23.5) ** 2 + (x - 47.5) ** 2 < 15**2).float().expand(8, 3, 48, 96)
    said = augment_pictures(disc, torch.arange(8), 0, FinetuneTraining(**PLAIN | {"rotate": 90}))
    assert not torch.equal(said, disc)
    assert float((said - functional.avg_pool2d(disc, 3, 1, 1)).abs().max()) < 0.7
    torch.testing.assert_close(said.sum(dim=(1, 2, 3)), disc.sum(dim=(1, 2, 3)), rtol=0.02, atol=0)


def test_boxes_become_picture_labels_and_pictures_without_teach_nothing(small: Warehouse, tmp_path):
    targets = picture_targets(small, "largest")
    mask, label = (small.split("train").array(name)[:] for name in ("box_mask", "label"))
    wanted = [int(label[at, 0]) if mask[at].any() else -1 for at in range(len(label))]
    assert targets["train"].tolist() == wanted, (
        "the boxes of one of these pictures are all of one class"
    )
    task = make_task(tmp_path)
    batch = next(iter(FakeLoader("train")))
    task.targets = (torch.full((36,), -1), TARGETS["val"])
    loss, parts = task.loss(task.model, batch, 0)
    assert (float(loss.detach()), int(parts["right"])) == (0, 0)


def test_the_smallest_settings_are_those_of_the_design():
    shown = FinetuneSettings()
    assert (shown.blocks, shown.batch_size, shown.memory_budget_gb, shown.resume) == (
        4,
        4,
        4.0,
        True,
    )
    assert settings().resume
