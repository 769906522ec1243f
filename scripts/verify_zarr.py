"""python -m scripts.verify_zarr --config config.yaml [--verify.path WAREHOUSE --verify.level quick]

Compares a published version with its digests: every file, every inner chunk, every sample. Exit 1
when anything disagrees.
"""

from typing import Any

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress
from warehouse.settings import BuildSettings, VerifySettings

log = get_log("verify_zarr")


class Settings(CommandSettings):
    verify: VerifySettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, Any]:
    from warehouse import Warehouse
    from warehouse.inspect.verify import verify

    warehouse = Warehouse.open(settings.verify.path or settings.build.output_root)
    samples = sum(len(warehouse.split(name)) for name in warehouse.splits)
    with progress(samples, "samples", f"verifying {warehouse.version}") as bar:
        files, faults = verify(warehouse, settings.verify.level, progress=bar.advance)
    for fault in faults:
        log.error(f"{fault.path}: {fault.detail}")
    if faults:
        log.error(
            "the version is damaged; build it again with python -m scripts.build_zarr --build.if_exists clear"
        )
    else:
        log.info(f"{warehouse.version}: {files} files as published")
        pictures = (
            "train_detector --detector.warehouse"
            if "box" in warehouse.manifest.arrays
            else "inspect_zarr --inspect.path"
        )
        log.info(
            f"next: python -m scripts.{pictures if warehouse.cube is None else 'train_vqvae --vqvae.warehouse'} {warehouse.folder}"
        )
    return {"ok": not faults, "files": files, "bad": [fault.path for fault in faults]}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
