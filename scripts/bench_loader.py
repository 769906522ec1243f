"""python -m scripts.bench_loader --config config.yaml [--bench.pictures FOLDER --bench.repeats 5]

Measures the loader, the limits of the machine and other readers on the same decoded pixels, in
interleaved rounds with a new process for each run. The median, minimum and maximum of each are
written to bench.json and bench.png. Readers that are not installed are listed with the reason.
"""

from benchmarks.settings import BenchSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log

log = get_log("bench_loader")


class Settings(CommandSettings):
    bench: BenchSettings


def main(settings: Settings) -> dict[str, object]:
    from benchmarks.bench_report import lines
    from benchmarks.suite import run_suite, write_result

    result = run_suite(settings.bench, log)
    for line in lines(result):
        log.info("%s", line)
    written = write_result(result, settings.bench)
    log.info("written: %s", ", ".join(written.values()))
    return result | written


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
