"""python -m scripts.inspect_zarr --config config.yaml [--inspect.path WAREHOUSE]

Prints the manifest of a version as tables, and draws a contact sheet of its images with their
boxes.
"""

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from warehouse.settings import BuildSettings, InspectSettings

log = get_log("inspect_zarr")


class Settings(CommandSettings):
    inspect: InspectSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from rich.console import Console

    from warehouse import Warehouse
    from warehouse.inspect.report import manifest_tables, write_contact_sheet

    warehouse = Warehouse.open(settings.inspect.path or settings.build.output_root)
    console = Console()
    for table in manifest_tables(warehouse):
        console.print(table)
    sheet = write_contact_sheet(warehouse, settings.inspect)
    drawn = "there is nothing to draw" if sheet is None else f"contact sheet: {sheet}"
    log.info("%s; next: python -m scripts.verify_zarr --verify.path %s", drawn, warehouse.folder)
    splits = {name: len(warehouse.split(name)) for name in warehouse.splits}
    return {
        "version": warehouse.version,
        "path": str(warehouse.folder),
        "splits": splits,
        "digest": warehouse.manifest.digest,
        "sheet": sheet and str(sheet),
    }


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
