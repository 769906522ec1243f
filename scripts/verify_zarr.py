"""python -m scripts.verify_zarr --config config.yaml [--verify.path WAREHOUSE --verify.level quick]

Compares every file, inner chunk and sample of a published version with its stored checksums. The
exit code is 1 if anything differs.
"""

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress
from warehouse.settings import BuildSettings, VerifySettings

log = get_log("verify_zarr")


class Settings(CommandSettings):
    verify: VerifySettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from warehouse import Warehouse
    from warehouse.inspect.verify import verify

    warehouse = Warehouse.open(settings.verify.path or settings.build.output_root)
    samples = sum(len(warehouse.split(name)) for name in warehouse.splits)
    with progress(samples, "samples", f"verifying {warehouse.version}") as bar:
        files, faults = verify(warehouse, settings.verify.level, progress=bar.advance)
    for fault in faults:
        log.error("%s: %s", fault.path, fault.detail)
    if faults:
        log.error(
            "the version is damaged; build it again with python -m scripts.build_zarr"
            " --build.if_exists clear"
        )
    else:
        log.info("%s: %d files as published", warehouse.version, files)
        arrays = warehouse.manifest.arrays
        # The first array that a version has tells which trainer it is for.
        trainers = {
            "box": "train_detector --detector.warehouse",
            "data": "train_vqvae --vqvae.warehouse",
        }
        following = [command for name, command in trainers.items() if name in arrays]
        command = following[0] if following else "inspect_zarr --inspect.path"
        log.info("next: python -m scripts.%s %s", command, warehouse.folder)
    return {"ok": not faults, "files": files, "bad": [fault.path for fault in faults]}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
