"""python -m scripts.compress_zarr --config config.yaml --compress.checkpoint FOLDER
[--compress.report FOLDER]

Encodes a whole cube with a trained VQ-VAE into a published version of codes below
compress.output_root. With --compress.reconstruct, the codes are also decoded and published as a
cube. With --compress.report, the codes are compared with other codecs on held-out blocks in size
and error. If the command is interrupted, run it again to resume it.
"""

import time
from pathlib import Path

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from vqvae.settings import CompressSettings
from warehouse.settings import BuildSettings

log = get_log("compress_zarr")


class Settings(CommandSettings):
    compress: CompressSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from vqvae.compress.publish_codes import publish_codes, publish_reconstruction
    from vqvae.rate.distortion import stored_rate
    from warehouse import Warehouse

    compress, start = settings.compress, time.monotonic()
    cube = Warehouse.open(compress.warehouse or settings.build.output_root)
    root = Path(compress.output_root)
    version = publish_codes(cube, compress).version
    codes, encoded = root / version, time.monotonic()
    rate = stored_rate(codes, compress.checkpoint)
    log.info(
        "%s: %.4f bits per valid value, %.1f MB for %.1f MB of float32",
        version,
        rate["bits_per_value"],
        rate["bytes"] / 1e6,
        rate["float32_bytes"] / 1e6,
    )
    result: dict[str, object] = {
        **rate,
        "psnr": None,
        "points": [],
        "path": str(codes),
        "version": version,
        "encode_seconds": round(encoded - start, 3),
    }
    if compress.reconstruct:
        folder, at = Path(compress.reconstruct), time.monotonic()
        decoded = publish_reconstruction(codes, folder, compress)
        result["reconstruction"] = str(folder / decoded.version)
        result["decode_seconds"] = round(time.monotonic() - at, 3)
    if compress.report:
        from vqvae.rate.rate_report import write_report

        result |= write_report(cube, codes, compress, Path(compress.report))
    log.info("next: python -m scripts.verify_zarr --verify.path %s", root)
    return result | {"seconds": round(time.monotonic() - start, 3)}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
