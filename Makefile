# Seven verbs; continuous integration calls the same ones.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := artifacts/demo

.PHONY: setup check test faults bench demo clean

setup: .venv/.ready

# Every extra but [bench]. The constraints keep torch at the pinned build: an open range can pull several GB of CUDA packages.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_architecture.py

test: setup
	$(PY) -m pytest -q

faults:
	@echo "The fault card is not available yet. Its first tests are in tests/warehouse/test_store.py and tests/warehouse/test_build.py."

# Its own environment: some of the readers compared with would pull torchvision, which has no CPU build for this torch, and old NumPy.
# FFCV is built from source and needs Debian's libopencv-dev, libturbojpeg0-dev and pkg-config. What fails to install is listed as absent.
bench: .venv-bench/.ready
	.venv-bench/bin/python -m scripts.bench_loader $(BENCH)

.venv-bench/.ready: pyproject.toml constraints.txt benchmarks/no_deps.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	-.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "transformers<5" requests
	-.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/no_deps.txt
	-.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ffcv
	touch $@

# Makes a sample, builds, trains, draws. Under 5 minutes on 2 cores once installed.
demo: setup
	$(PY) -m scripts.make_sample --sample.output $(DEMO)/sample --sample.count 320 --sample.size "[256, 256]"
	$(PY) -m scripts.build_zarr --build.input_root $(DEMO)/sample --build.output_root $(DEMO)/warehouse --build.target_size "[128, 128]"
	$(PY) -m scripts.inspect_zarr --inspect.path $(DEMO)/warehouse --inspect.output $(DEMO)/sheet.png
	$(PY) -m scripts.train_detector --detector.model big --detector.warehouse $(DEMO)/warehouse --detector.epochs null --detector.max_minutes 2.5 --detector.evaluate_every 5 --detector.output $(DEMO)/bigdet --experiments.db $(DEMO)/experiments.db
	$(PY) -m scripts.infer_view --infer.checkpoint $(DEMO)/bigdet --infer.threshold 0.4 --infer.input $(DEMO)/warehouse --infer.output $(DEMO)/view
	$(PY) -m scripts.make_sample --sample.kind cube --sample.output $(DEMO)/landscape --sample.count 10
	$(PY) -m scripts.build_zarr --config $(DEMO)/landscape/raster.yaml --build.output_root $(DEMO)/cube
	$(PY) -m scripts.train_vqvae --vqvae.warehouse $(DEMO)/cube --vqvae.epochs null --vqvae.max_minutes 0.7 --vqvae.output $(DEMO)/vqvae --experiments.db $(DEMO)/experiments.db
	@echo
	@echo "Look at:  $(DEMO)/sheet.png               what was baked"
	@echo "          $(DEMO)/view/index.html         what the detector finds, with a score slider"
	@echo "          $(DEMO)/bigdet/                 checkpoint, curve and log of the training"
	@echo "          $(DEMO)/vqvae/sheet.png         blocks of a cube and what is left of them after its codes"

clean:
	rm -rf .venv .venv-bench artifacts checkpoints experiments build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
