"""Micro-jobs.

The queue, killed and damaged jobs, the published version against encoding in one go.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from features.encoders.network import NetworkEncoder, he_init
from features.encoders.open_encoder import open_encoder
from features.export import export_npz, export_queue
from features.feature_jobs import plan_features
from features.image_labels import picture_labels
from features.settings import FeatureSettings
from utils.jobs.publish_jobs import publish_jobs
from utils.jobs.queue import JobQueue
from utils.jobs.run import open_queue, recover_jobs, run_jobs
from warehouse import Warehouse
from warehouse.errors import ConfigError, DatabaseError, TrainingError
from warehouse.inspect.verify import verify
from warehouse.write.publish import open_root, staging_folder


def tiny(seed=0):
    """A one-layer encoder: 6 features from a 4 x 4 map."""
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    he_init(network, seed)
    return NetworkEncoder("tiny", network, [network[0]], size=(16, 16), random=True)


def prepared(source, folder, **options):
    """(plan, load, queue, root) of the small warehouse: 4 + 2 jobs."""
    settings = FeatureSettings(
        output_root=str(folder / "out"),
        work=str(folder / "work"),
        **{"job_size": 8, "batch_size": 3, **options},
    )
    root = Path(settings.output_root)
    open_root(root)
    plan, load = plan_features(source, tiny(), settings)
    return plan, load, open_queue(plan, Path(settings.work)), root


def finished(source, folder, **options):
    plan, load, queue, root = prepared(source, folder, **options)
    with queue:
        run_jobs(plan, load, queue, root)
        manifest = publish_jobs(plan, load, queue, root)
        assert manifest is not None
        return Warehouse.open(root), queue.rows()


def test_features_in_jobs_are_those_of_encoding_everything_at_once(small, tmp_path):
    version, rows = finished(small, tmp_path, feature_map=True)
    assert verify(version)[1] == []
    assert [row["state"] for row in rows] == ["done"] * 6
    assert {row["attempts"] for row in rows} == {1}
    encoder = tiny()
    for name in version.splits:
        with torch.inference_mode():
            said = encoder(torch.from_numpy(small.split(name).array("image")[:]))
        np.testing.assert_allclose(
            version.split(name).array("feature")[:], said.pooled.numpy(), rtol=2e-3, atol=1e-5
        )
        np.testing.assert_allclose(
            version.split(name).array("feature_map")[:], said.spatial.numpy(), rtol=2e-3, atol=1e-4
        )
    assert version.manifest.recipe["encoder"]["random"] is True
    assert version.manifest.warnings[-1].startswith("random features")
    old, new = (one.table("samples.parquet").drop_columns("sha256") for one in (small, version))
    assert new.equals(old)


def test_jobs_done_a_few_at_a_time_publish_the_same_version(small, tmp_path):
    whole, _ = finished(small, tmp_path / "whole")
    left = []
    for _ in range(3):
        plan, load, queue, root = prepared(small, tmp_path / "parts")
        with queue:
            run_jobs(plan, load, queue, root, limit=2)
            left.append(queue.left())
            if not left[-1]:
                assert publish_jobs(plan, load, queue, root).digest == whole.manifest.digest
    assert left == [4, 2, 0]


def die_in_job(source, folder, number, threads):
    # Sums depend on the number of threads, and the run this one is compared with has this many.
    torch.set_num_threads(threads)
    plan, load, queue, root = prepared(Warehouse.open(source), folder)
    calls = iter(range(1000))

    def fatal(payload):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(payload)

    run_jobs(plan, fatal, queue, root)


def test_a_killed_job_is_done_again_and_only_it(small, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=die_in_job, args=(small.folder, tmp_path / "killed", 2, torch.get_num_threads())
    )
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    version, rows = finished(small, tmp_path / "killed")
    assert [row["attempts"] for row in rows] == [1, 1, 2, 1, 1, 1]
    whole, _ = finished(small, tmp_path / "whole")
    assert version.manifest.digest == whole.manifest.digest


def test_a_job_whose_marker_is_there_is_not_computed_again(small, tmp_path):
    plan, load, queue, root = prepared(small, tmp_path)
    with queue:
        run_jobs(plan, load, queue, root, limit=1)
        queue.reopen(0, "as if killed after its marker")

        def never(payload):
            raise AssertionError(payload)

        assert run_jobs(plan, never, queue, root, limit=1) == 1


def test_jobs_that_are_done_elsewhere_or_deleted_are_open_again_at_once(small, tmp_path):
    plan, load, queue, root = prepared(small, tmp_path)
    with queue:
        run_jobs(plan, load, queue, root, limit=3)
        assert recover_jobs(plan, queue, root) == 0
        other = tmp_path / "other"
        open_root(other)
        assert recover_jobs(plan, queue, other) == 3
        assert run_jobs(plan, load, queue, other) == 6
        assert publish_jobs(plan, load, queue, other) is not None
        assert recover_jobs(plan, queue, other) == 0


def test_a_damaged_chunk_is_found_before_publishing_and_made_again(small, tmp_path):
    plan, load, queue, root = prepared(small, tmp_path)
    with queue:
        run_jobs(plan, load, queue, root)
        path = staging_folder(root, plan.version) / "warehouse.zarr/train/feature/c/1/0"
        data = bytearray(path.read_bytes())
        data[30] ^= 1
        path.write_bytes(bytes(data))
        assert publish_jobs(plan, load, queue, root) is None
        assert [row["id"] for row in queue.rows() if row["state"] == "open"] == [1]
        run_jobs(plan, load, queue, root)
        assert publish_jobs(plan, load, queue, root) is not None
    assert verify(Warehouse.open(root))[1] == []


def test_no_two_claimants_get_one_job(tmp_path):
    taken: list[int] = []

    def claim():
        with JobQueue(tmp_path / "jobs.db", [("train", at, 8) for at in range(40)]) as queue:
            while (job := queue.claim()) is not None:
                taken.append(job.id)
                queue.finish(job, 0.0, "")

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(40))


def test_a_failed_job_is_written_down_and_left_for_the_next_command(tmp_path):
    with JobQueue(tmp_path / "jobs.db", [("train", 0, 8)]) as queue:
        queue.fail(queue.claim(), "no luck")
        assert queue.claim() is None
        assert queue.rows()[0]["error"] == "no luck"
    with JobQueue(tmp_path / "jobs.db") as again:
        assert again.claim().attempts == 2


def test_a_file_that_is_no_queue_is_a_typed_error(tmp_path):
    (tmp_path / "jobs.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DatabaseError, match=r"jobs\.db"):
        JobQueue(tmp_path / "jobs.db")


def test_features_without_variance_are_refused(small, tmp_path):
    plan, load, queue, root = prepared(small, tmp_path)
    nn.init.zeros_(load.encoder.network[0].weight)
    with queue, pytest.raises(TrainingError, match="without variance"):
        run_jobs(plan, load, queue, root)


def test_exports_name_every_picture_once(small, tmp_path):
    plan, load, queue, root = prepared(small, tmp_path)
    with queue:
        run_jobs(plan, load, queue, root)
        publish_jobs(plan, load, queue, root)
        _, parquet = export_queue(queue, small, plan.version, 8)
    version = Warehouse.open(root)
    rows = pq.read_table(parquet).to_pylist()
    assert [name for row in rows for name in row["pictures"]] == small.table("samples.parquet")[
        "source"
    ].to_pylist()
    assert all((root / row["features_path"]).is_file() for row in rows)
    assert export_npz(version, tmp_path) == 38
    with np.load(tmp_path / "features/encoder_tiny/img_val_000003.npz") as saved:
        assert saved["global_pool"].dtype == np.float16
        assert (saved["global_pool"] == version.split("val").array("feature")[3]).all()


def test_boxes_name_their_picture():
    box = np.array([[[0, 0, 0.5, 0.5], [0, 0, 0.1, 0.1], [0, 0, 0.1, 0.2]]] * 2, np.float32)
    label = np.array([[2, 1, 1]] * 2, np.int16)
    counted = np.array([[True] * 3, [False] * 3])
    assert picture_labels(box, label, counted, "largest").tolist() == [2, -1]
    assert picture_labels(box, label, counted, "commonest").tolist() == [1, -1]


def test_random_efficientnet_follows_its_seed_and_says_what_it_is():
    one, again, other = (
        open_encoder("random:efficientnet_b0", size=32, seed=seed) for seed in (1, 1, 2)
    )
    assert one.fingerprint() == again.fingerprint()
    assert one.fingerprint()["weights_sha256"] != other.fingerprint()["weights_sha256"]
    assert json.dumps(one.fingerprint()).count("random") == 2
    pictures = torch.randint(
        0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        said = one(pictures)
        alone = one(pictures[:1])
    assert said.pooled.shape == (2, 1280)
    assert float(said.pooled.std(dim=0).max()) > 0
    torch.testing.assert_close(said.pooled[:1], alone.pooled, rtol=1e-4, atol=1e-6)
    assert one.last_blocks(4) == list(one.network.model.encoder.blocks)[-4:]


@pytest.mark.parametrize("name", ["random:nonesuch", "./nowhere", "no-such/model-at-all"])
def test_an_encoder_that_is_not_there_is_never_random(name):
    with pytest.raises(ConfigError):
        open_encoder(name, offline=True)
