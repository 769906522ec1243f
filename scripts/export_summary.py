"""python -m scripts.export_summary --config config.yaml [--export.path WAREHOUSE --export.output
FOLDER]

Writes the summaries, samples, chunks and timings of a version as Parquet tables for DuckDB, pandas
or a spreadsheet.
"""

from pathlib import Path

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from warehouse.settings import BuildSettings, ExportSettings

log = get_log("export_summary")


class Settings(CommandSettings):
    export: ExportSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from warehouse import Warehouse
    from warehouse.inspect.summary import export

    warehouse = Warehouse.open(settings.export.path or settings.build.output_root)
    output = Path(settings.export.output)
    rows = export(warehouse, output)
    log.info("%s in %s; next: open them with DuckDB as in the README", ", ".join(rows), output)
    return {"path": str(output), "files": [str(output / name) for name in rows], "rows": rows}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
