#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, without a network: build for its architecture, run the GPU tests and the benches.
# Needs python3 with torch, triton, numpy, pybind11, cmake, ninja, pytest and rich, and nvcc. Done within 9 minutes; every part has its own limit, and a
# part that fails does not keep the next from running: the exit code is that of the worst, and summary.txt lists them. A part whose time is up is
# interrupted as by Ctrl-C, so that it still says what it found; benches begin no row that late.
#
#   bench/gpu.sh                          results in bench/results/<device>/<date>
#   bench/gpu.sh lowrank quant            after the build only these of: doctor tests bench lowrank quant sparse; each may take all the time that is left
#   bench/gpu.sh sanitizers               instead of all: compute-sanitizer's four tools over a few cases of every CUDA kernel
#   OUT=/tmp/x PYTHON=python3.12 bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
started=$(date +%s)
TOTAL=${TOTAL:-530}
PARTS=" doctor tests bench lowrank quant sparse "
for name in "$@"; do
  [[ $PARTS == *" $name "* || $# == 1 && $name == sanitizers ]] || { echo "gpu.sh: expected parts among$PARTS, or sanitizers alone; got $name" >&2; exit 2; }
done
chosen=" $* "

device=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0) || { echo "gpu.sh: expected an NVIDIA GPU; nvidia-smi found none; run it where one is" >&2; exit 2; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 | tr -d '. ')
OUT=${OUT:-bench/results/$(echo "$device" | tr ' /' '--' | tr -cd '[:alnum:]._-')/$(date -u +%Y-%m-%d)}
mkdir -p "$OUT"
: >"$OUT/summary.txt"
worst=0

# part <name> <seconds> <command…>: runs it under the smaller of its own limit and what is left of the whole; output to <name>.log and the terminal. The
# word SECONDS of the command becomes the time after which nothing should begin.
part() {
  local name=$1 limit=$2 left code
  shift 2
  [[ $PARTS == *" $name "* && $chosen != "  " && $chosen != *" $name "* ]] && return 0
  left=$((TOTAL - ($(date +%s) - started)))
  ((limit > left)) || [[ $chosen == *" $name "* ]] && limit=$left
  if ((limit < 5)); then
    echo "$name: not run, the $TOTAL seconds were up" | tee -a "$OUT/summary.txt"
    worst=1
    return 1
  fi
  set -- "${@/#SECONDS/$((limit > 60 ? limit - 30 : limit / 2))}"
  echo "== $name (at most $limit s): $*"
  timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 40
  code=${PIPESTATUS[0]}
  echo "$name: exit $code after $(($(date +%s) - started)) s from the start" | tee -a "$OUT/summary.txt"
  ((code > worst)) && worst=$code
  return "$code"
}

build() {
  # setuptools before 77 refuses the licence field of pyproject.toml; it is not needed to drive CMake.
  if "$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)'; then
    "$PYTHON" setup.py -q build_ext --inplace
  else
    "$PYTHON" -c 'import setup; setup.build_in_place()'
  fi
}
export -f build
export PYTHON FUSEDADAPT_CORE=on FUSEDADAPT_CUDA=on FUSEDADAPT_CUDA_ARCHS=$arch PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

{
  date -u +%FT%TZ
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' with changes')"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
} >"$OUT/machine.txt" 2>&1

part build 180 bash -c build || { cat "$OUT/build.log"; exit 1; }
# the tests' conftest.py would otherwise choose Triton's interpreter
export TRITON_INTERPRET=0
# by name: collecting the others needs what only a developer's machine has, and one error there would run nothing
mapfile -t files < <(grep -l "mark\.gpu" tests/test_*.py)
tests=("$PYTHON" -m pytest -v -p no:cacheprovider -m gpu "${files[@]}")  # -v: each verdict as it comes
workers=$(($(nproc) > 12 ? 12 : $(nproc)))
if "$PYTHON" -c 'import xdist' 2>/dev/null; then  # workers with as many threads as cores each would wait for one another
  tests=(env "OMP_NUM_THREADS=$((($(nproc) + workers - 1) / workers))" "${tests[@]}" -n "$workers")
fi
if [[ $chosen == " sanitizers " ]]; then
  # Without the caching allocator, so that a write past a tensor is one past an allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 GPU_CASES=few
  for tool in memcheck racecheck initcheck synccheck; do
    part "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu \
      -k "cuda and (bits or one_byte or masks or topk or scores or deltas or grow) or test_products_repeat and None" \
      tests/test_gpu_optim.py tests/test_gpu_sparse.py tests/test_gpu_quant.py
  done
  cat "$OUT/summary.txt"
  exit "$worst"
fi
part doctor 60 "$PYTHON" -m fusedadapt doctor
part tests 300 "${tests[@]}"
part bench 150 "$PYTHON" -m fusedadapt bench optim --device cuda --seconds 3 --within SECONDS --json "$OUT/optim.json" --plots "$OUT"
# 2 s a row; the 200 shapes of the grid take a twentieth of that each
part lowrank 150 "$PYTHON" -m fusedadapt bench lowrank --device cuda --seconds 2 --within SECONDS --json "$OUT/lowrank.json" --plots "$OUT"
part quant 120 "$PYTHON" -m fusedadapt bench quant --device cuda --seconds 0.5 --within SECONDS --json "$OUT/quant.json" --plots "$OUT"
part sparse 100 "$PYTHON" -m fusedadapt bench sparse --device cuda --seconds 1 --within SECONDS --json "$OUT/sparse.json" --plots "$OUT"

cat "$OUT/summary.txt"
echo "results in $OUT"
exit "$worst"
