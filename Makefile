# Everything from a bare machine with Python 3.11+ and a C++ compiler: `make demo`, `make test`.
PYTHON ?= python3
PROMPT ?= a red circle moves right on a gray background
IMAGE ?= examples/first_frame.png
BIN := .venv/bin
WORKERS ?= 2

# pip splits this value at blanks, hence the escaped URL. Newer pips read the second name for build requirements.
empty :=
CONSTRAINTS := file://$(subst $(empty) $(empty),%20,$(CURDIR))/constraints.txt
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_BUILD_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench clean

demo: .venv/.installed
	$(BIN)/pusa-fast generate "$(PROMPT)" --image "$(IMAGE)" --out clip.mp4 --overwrite

test: .venv/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.hpp' '*.cu' '*.h')
	$(BIN)/vulture

bench: .venv/.installed
	$(BIN)/pusa-fast bench ops
	$(BIN)/pusa-fast bench attention
	$(BIN)/pusa-fast bench dit
	$(BIN)/pusa-fast bench vae
	$(BIN)/pusa-fast bench e2e

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis clip.mp4 clip.png clip.json

# torch goes first and alone: it decides which triton fits.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch
	$(BIN)/python -m pip install 'triton; sys_platform == "linux"'
	touch $@

.venv/.installed: .venv/.torch pyproject.toml CMakeLists.txt pusa_fast/__init__.py $(wildcard csrc/*)
	$(BIN)/python -m pip install -e '.[test,bench]'
	touch $@
