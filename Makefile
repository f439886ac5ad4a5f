# make demo: search, fine-tune, certify and report on the embedded digits. make test: all tests.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo unit test check lock clean

demo: .venv/installed
	$(BIN)/python -m cadis_ray.tune search_spaces/digits.yaml

# What needs no process and no Ray.
unit: .venv/installed
	$(BIN)/python -m pytest -m unit

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# uv itself comes from the lock, with its hashes, through pip.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	awk '/^[^ #]/ {take = /^uv==/} take' requirements.lock > .venv/uv.lock
	$(BIN)/pip install --quiet --require-hashes -r .venv/uv.lock
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Regenerates every pin and hash from the ranges in pyproject.toml.
lock: .venv/installed
	$(BIN)/uv pip compile pyproject.toml --group dev --extra diffusers --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" --upgrade --quiet \
		--output-file requirements.lock

clean:
	rm -rf .venv runs
