.PHONY: setup demo test lint docs clean

setup: .venv/.ready  ## the environment, in .venv

.venv/.ready: setup.cfg pyproject.toml .ci/setup
	./.ci/setup

demo: setup  ## raw media to a trained model, images and a report, at toy size on this machine
	.venv/bin/nextstate demo

test: setup  ## every test
	.venv/bin/python -m pytest tests

lint: setup  ## format, style, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy model data_pipeline training launch examples

docs: setup  ## run the commands of README and docs
	.venv/bin/python -m pytest tests/test_documentation.py

clean:  ## environment, caches and runs
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
