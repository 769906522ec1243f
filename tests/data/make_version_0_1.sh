#!/bin/sh
# Builds the versions that tests/data/version_0_1.tar.gz holds:
#
#   sh tests/data/make_version_0_1.sh FOLDER
#
# Run it from a checkout of the commit whose versions are to be kept (tests/data/README.md names
# it), with that checkout's environment active. FOLDER must not exist yet.

set -e
work=$1
out=$work/version_0_1
mkdir "$work"

# 12 pictures with boxes in stored chunks of 8 and 4, and 4 in the split val.
python -m scripts.make_sample --sample.output "$work/sample" \
    --sample.count 16 --sample.size '[64, 64]' --sample.seed 1
python -m scripts.build_zarr --build.input_root "$work/sample" --build.output_root "$out/pictures" \
    --build.target_size '[32, 32]' --build.max_boxes 12 --build.shard_samples 8 \
    --build.splits '{"train": 0.75, "val": 0.25}' --build.workers 0

# A cube of 4 dates, 32 x 32 pixels and 3 features in 4 stored chunks.
python -m scripts.make_sample --sample.kind cube --sample.output "$work/landscape" \
    --sample.count 4 --sample.size '[96, 96]'
cat > "$work/cube.yaml" <<'END'
build: {format: raster, splits: {train: 0.5, val: 0.25, test: 0.25}}
raster:
  grid: {crs: 'EPSG:32633', resolution: 30, bounds: [500000, 5199040, 500960, 5200000]}
  time: {pattern: 'scene_(?P<date>\d{8})'}
  features:
    - {name: ndvi, index: ndvi, red: 1, nir: 4, files: scenes/*.tif}
    - {name: cover, files: cover.tif, kind: categorical, codes: [1, 2, 5, 8], static: true}
    - {name: height, files: height.tif, kind: canopy, static: true, units: m}
  chunk: {time: 2, y: 8, x: 8}
  shard: {time: 4, y: 16, x: 16}
  block: {y: 16, x: 16}
  empty_dates: keep
END
python -m scripts.build_zarr --config "$work/cube.yaml" --build.input_root "$work/landscape" \
    --build.output_root "$out/cube" --build.workers 0

# Features of the pictures, a row of 1,280 numbers each.
python -m scripts.extract_features --features.warehouse "$out/pictures" \
    --features.output_root "$out/features" --features.work "$work/jobs" \
    --features.encoder random:efficientnet_b0 --features.size 32 --features.job_size 8

# Codes of the cube.
python -m scripts.train_vqvae --vqvae.warehouse "$out/cube" --vqvae.output "$work/vqvae" \
    --vqvae.epochs 4 --vqvae.batch_size 4 --vqvae.width 8 --vqvae.depth 1 \
    --vqvae.codebook_size 16 --vqvae.code_dim 4 --vqvae.levels 2 \
    --vqvae.stride '[1, 4, 4]' --vqvae.patch '[1, 4, 4]' \
    --experiments.db "$work/experiments.db"
python -m scripts.compress_zarr --compress.warehouse "$out/cube" \
    --compress.checkpoint "$work/vqvae" --compress.output_root "$out/codes" \
    --compress.shard_samples 8

# Owners and times of the machine that built them are of no interest.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work" -cf - version_0_1 \
    | gzip -9n > "$work/version_0_1.tar.gz"
