#!/bin/sh
# On a machine with a GPU: tests of the Triton kernels, then the benchmark suites.
#
#   experiments/gpu_check.sh [tests] [inference] [training] [crossover]    all by default; each suite ends within 8 minutes
#
# PYTHON: an interpreter with torch for CUDA, triton, pytest and hydra-core (default: python3).
# ROWS: folder of the rows, {inference,training,crossover}_cuda.csv and .ratios.csv (default: results/bench, where
# `python -m experiments.tables bench` finds them). A step that fails does not stop those after it, but is told in the end.
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
rows=${ROWS:-results/bench}
failed=
"$python" -c 'import hydra, pytest, torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)' ||
  exit
for step in ${*:-tests inference training crossover}; do
  echo "== $step"
  case $step in
    tests) "$python" -m pytest -q tests/ops/test_triton*.py tests/bench/test_gpu.py ;;
    # What is measured until the limit has been written.
    inference | training | crossover) timeout 480 "$python" -m experiments.bench suite="$step" device=cuda out="$rows" ;;
    *) echo "$step: none of tests, inference, training, crossover" >&2 && exit 2 ;;
  esac || failed="$failed $step"
done
echo "rows: $(ls "$rows"/*_cuda*.csv 2>/dev/null | tr '\n' ' ')"
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
