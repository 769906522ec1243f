"""python -m scripts.compress_zarr --config config.yaml --compress.checkpoint FOLDER
[--compress.report FOLDER]

Encodes a whole cube with a trained VQ-VAE into a published version of codes, under
compress.output_root. On wish decodes it again into a cube version, and compares the codes with
other codecs on held-out blocks. Killed, it goes on where it stopped.
"""

import time
from pathlib import Path
from typing import Any

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress
from vqvae.settings import CompressSettings
from warehouse.settings import BuildSettings

log = get_log("compress_zarr")


class Settings(CommandSettings):
    compress: CompressSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, Any]:
    from vqvae.compress.encode import codes_recipe, plan_codes
    from vqvae.compress.reconstruct import plan_reconstruction
    from vqvae.rate.distortion import stored_rate
    from warehouse import Warehouse

    compress, start = settings.compress, time.monotonic()
    cube = Warehouse.open(compress.warehouse or settings.build.output_root)
    root = Path(compress.output_root)
    recipe, _ = codes_recipe(cube, compress)
    manifest = publish(recipe, lambda: plan_codes(cube, compress), root, compress)
    codes = root / manifest.version
    encoded = time.monotonic()
    rate = stored_rate(codes, compress.checkpoint)
    log.info(
        "%s: %.4f bits a valid value, %.1f MB for %.1f MB of float32",
        manifest.version,
        rate["bits_per_value"],
        rate["bytes"] / 1e6,
        rate["float32_bytes"] / 1e6,
    )
    result: dict[str, Any] = {
        **rate,
        "psnr": None,
        "points": [],
        "path": str(codes),
        "version": manifest.version,
        "encode_seconds": round(encoded - start, 3),
    }
    if compress.reconstruct:
        at = time.monotonic()
        plan, load = plan_reconstruction(codes, compress.checkpoint, device=compress.device)
        again = publish(plan.recipe, lambda: (plan, load), Path(compress.reconstruct), compress)
        result |= {
            "reconstruction": str(Path(compress.reconstruct) / again.version),
            "decode_seconds": round(time.monotonic() - at, 3),
        }
    if compress.report:
        from vqvae.rate.rate_report import write_report

        result |= write_report(cube, codes, compress, Path(compress.report))
    log.info("next: python -m scripts.verify_zarr --verify.path %s", root)
    return result | {"seconds": round(time.monotonic() - start, 3)}


def publish(recipe: Any, make_plan: Any, root: Path, compress: Any) -> Any:
    from contextlib import ExitStack

    from warehouse.format.manifest import version_name
    from warehouse.write.publish import bake, open_root, published

    version, _ = version_name(recipe)
    manifest = None if compress.if_exists == "clear" else published(root, version)
    if manifest is not None:
        log.info("already there: %s; --compress.if_exists clear makes it again", version)
        return manifest
    open_root(root)
    plan, load = make_plan()
    with ExitStack() as stack:

        def on_plan(plan: Any) -> Any:
            return stack.enter_context(
                progress(plan.samples, "stored chunks", f"baking {plan.version}")
            ).advance

        return bake(
            lambda _: plan,
            lambda _: load,
            root,
            workers=compress.workers,
            cluster=None,
            trace=True,
            on_plan=on_plan,
            clear=compress.if_exists == "clear",
        )


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
