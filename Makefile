# The commands people expect. They use the active Python environment; CI is .ci/run.
CPP = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: install build test lint format bench machine-code figures clean

# Editable, with everything that developing needs.
install:
	pip install -c constraints.txt -e ".[test,dev,bench]"

# After a change in csrc/: rebuilds what changed, in place.
build:
	python setup.py build_ext --inplace

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

bench:
	python -m bench

# The plots, pages and tables of bench/results, from the JSON there.
figures:
	python -m bench plot

# After a change of a kernel: what nvcc makes of all of them, as the tests compare it.
machine-code:
	python -m bench machine-code --update

clean:
	rm -rf build dist *.egg-info pyllm/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
