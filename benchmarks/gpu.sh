#!/usr/bin/env bash
# The checks and the benchmark of one CUDA device, within ten minutes: tests/gpu that need neither Ray nor vLLM, then
# benchmarks/gpu_step.py. Needs torch 2.11, transformers 5.17, peft, pyarrow, pytest and hypothesis; `make gpu-wheels`
# fetches what a bare machine with these lacks.
#
#   benchmarks/gpu.sh [FOLDER FOR THE RESULTS]         PYTHON=python3  TESTS_LIMIT=150  STEPS_LIMIT=300  (seconds)
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks}
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Most of a test's time is the compiler's, which has the machine's cores to itself.
"$python" -c 'import xdist' 2>/dev/null && processes="-n 8"
timeout "${TESTS_LIMIT:-150}" "$python" -m pytest --noconftest -o addopts= -q --tb=short --durations=5 -p no:cacheprovider \
    ${processes:-} ${TESTS:-tests/gpu/test_attention_gpu.py tests/gpu/test_train_gpu.py} 2>&1 | tee "$results/gpu_tests.log" | tail -n 60
tests=$?
"$python" -m benchmarks.gpu_step --limit "${STEPS_LIMIT:-300}" --json "$results/gpu_results.json" ${STEPS_OPTIONS:-} \
    2> >(grep -v -i warn | tail -n 20 >&2)
steps=$?
exit $((tests ? tests : steps))
