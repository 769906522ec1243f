"""The table of all sections of config.yaml.

A command's own sections are the fields of its `Settings`. This table exists for what a command must
recognise without using it: other commands' sections in the config file and in the environment.
"""

from warehouse.section import Section

__all__ = ["SECTION_NAMES", "all_sections"]

# A test compares these names with the table below.
SECTION_NAMES = (
    "sample",
    "build",
    "raster",
    "inspect",
    "verify",
    "export",
    "loader",
    "detector",
    "infer",
    "vqvae",
    "experiments",
    "compress",
    "runs",
    "features",
    "head",
    "finetune",
    "segment",
    "bench",
)


def all_sections() -> dict[str, type[Section]]:
    """The model of every section, in the order of config.yaml."""
    # Imported only here: a command that needs none of them answers `--help` sooner.
    from benchmarks.settings import BenchSettings
    from detector.settings import DetectorSettings, InferSettings
    from features.finetuning.settings import FinetuneSettings
    from features.settings import FeatureSettings, HeadSettings
    from ingest.rasters.settings import RasterSettings
    from ingest.synthetic.settings import SampleSettings
    from segmentation.settings import SegmentSettings
    from utils.loading.settings import LoaderSettings
    from utils.tracking.settings import ExperimentSettings, RunsSettings
    from vqvae.settings import CompressSettings, VqvaeSettings
    from warehouse.settings import (
        BuildSettings,
        ExportSettings,
        InspectSettings,
        VerifySettings,
    )

    return {
        "sample": SampleSettings,
        "build": BuildSettings,
        "raster": RasterSettings,
        "inspect": InspectSettings,
        "verify": VerifySettings,
        "export": ExportSettings,
        "loader": LoaderSettings,
        "detector": DetectorSettings,
        "infer": InferSettings,
        "vqvae": VqvaeSettings,
        "experiments": ExperimentSettings,
        "compress": CompressSettings,
        "runs": RunsSettings,
        "features": FeatureSettings,
        "head": HeadSettings,
        "finetune": FinetuneSettings,
        "segment": SegmentSettings,
        "bench": BenchSettings,
    }
