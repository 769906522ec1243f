"""python -m scripts.export_summary --config config.yaml [--export.path WAREHOUSE --export.output
FOLDER]

Writes a version's summaries, samples, chunks and timings as Parquet tables, for DuckDB, pandas or a
spreadsheet.
"""

from pathlib import Path
from typing import Any

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from warehouse.settings import BuildSettings, ExportSettings

log = get_log("export_summary")


class Settings(CommandSettings):
    export: ExportSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, Any]:
    from warehouse import Warehouse
    from warehouse.inspect.summary import export

    warehouse = Warehouse.open(settings.export.path or settings.build.output_root)
    output = Path(settings.export.output)
    rows = export(warehouse, output)
    log.info(f"{', '.join(rows)} in {output}; next: open them with DuckDB, as the README shows")
    return {"path": str(output), "files": [str(output / name) for name in rows], "rows": rows}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
