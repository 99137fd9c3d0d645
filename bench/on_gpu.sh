#!/usr/bin/env bash
# Everything worth measuring on a GPU that is available for minutes only: most valuable first, each
# step with its own time limit; a failed step does not stop the rest. Needs torch, triton, rich and
# transformers; no network, no installation, no git.
#
#   OUT=results bench/on_gpu.sh [STEP...]
#
# OUT      folder for the results: one JSON file per step, tests.txt, log.txt
# LIMIT    seconds for all steps together (default 570)
# WHEELS   folder of wheels to put on the path first (diffusers; pybind11, for the compiled part;
#          flash-attn-4 and its dependencies)
# PYTHON   interpreter (default python3)
# Results are written as they come in: a step that is cut short keeps what it has measured.
set -u
steps=(native tests e2e-480p train ops vae-480p attention e2e-720p vae-720p dit e2e-480p-fp8 numerics sanitizer)
cd "$(dirname "$0")/.."
: "${OUT:?OUT names the folder for the results}"
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-570}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  install=(-m pip install -q --no-index --no-deps --no-compile --target "$site")
  "$PYTHON" "${install[@]}" "$WHEELS"/*.whl >>"$OUT/log.txt" 2>&1 && PYTHONPATH=$PYTHONPATH:$site
fi

# step NAME SECONDS COMMAND...: runs within its own limit and the rest of LIMIT; reports the exit code.
step() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS rc
  shift 2
  if [ "$left" -lt 30 ]; then
    echo "$name: skipped, $left s left"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name" >>"$OUT/log.txt"
  timeout -k 10 "$limit" "$@" </dev/null >>"$OUT/log.txt" 2>&1
  rc=$?
  echo "$name: exit $rc after $((SECONDS - start)) s"
}

# bench NAME SECONDS KIND OPTIONS: the run stops starting new measurements 30 s before it would be killed.
bench() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS))
  [ "$limit" -le "$left" ] || limit=$left
  local seconds=$((limit > 60 ? limit - 30 : 30))
  step "$name" "$2" "$PYTHON" -m bench "$3" \
    "{\"device\": \"cuda\", \"seconds\": $seconds, \"out\": \"$OUT/$name.json\"${4:+, $4}}"
}

e2e='"model": "wan2.1-t2v-14b", "random_weights": true'
# The compiled part, for this interpreter and GPU. Without pybind11 or a compiler the fallbacks run.
build_native() {
  local version pybind
  pybind=$("$PYTHON" -m pybind11 --cmakedir) &&
    version=$("$PYTHON" -c 'import pusa_fast; print(pusa_fast.__version__)') &&
    cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION_FULL="$version" \
      -Dpybind11_DIR="$pybind" -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
      -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCH:-90-real}" &&
    cmake --build build/gpu -j && cp build/gpu/_native*.so pusa_fast/ &&
    "$PYTHON" -c 'import pusa_fast._native as n; assert n.cuda_built(); print(n.isas())'
}

run_step() {
  case $1 in
    native) step native 150 bash -c 'build_native' ;;
    sanitizer)
      step sanitizer 200 compute-sanitizer --error-exitcode 9 \
        "$PYTHON" -m pytest -q -p no:cacheprovider tests/model/test_vae_cuda.py -k "tiles or stream"
      ;;
    tests)
      step tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels tests/model/test_vae_cuda.py \
        tests/attention tests/model/test_dit.py tests/training/test_train_memory.py tests/bench
      sed -n '/^== tests$/,$p' "$OUT/log.txt" | tail -60 >"$OUT/tests.txt"
      ;;
    e2e-480p) bench e2e-480p 240 e2e "$e2e, \"size\": \"480p\"" ;;
    train) bench train 240 train '"size": "480p"' ;;
    ops) bench ops 300 ops "" ;;
    vae-480p) bench vae-480p 150 vae '"size": "480p"' ;;
    attention) bench attention 180 attention "" ;;
    e2e-720p) bench e2e-720p 300 e2e "$e2e, \"size\": \"720p\"" ;;
    vae-720p) bench vae-720p 240 vae '"size": "720p"' ;;
    dit) bench dit 400 dit "" ;;
    e2e-480p-fp8) bench e2e-480p-fp8 180 e2e "$e2e, \"size\": \"480p\", \"precision\": \"fp8\"" ;;
    numerics) bench numerics 90 numerics "" ;;
  esac
}

export -f build_native
export PYTHON
[ $# -gt 0 ] || set -- "${steps[@]}"
for name in "$@"; do
  if [[ " ${steps[*]} " != *" $name "* ]]; then
    echo "$name: no such step; there are: ${steps[*]}" >&2
    exit 2
  fi
done
nvidia-smi -L 2>/dev/null
for name in "$@"; do run_step "$name"; done
echo "results in $OUT:" "$OUT"/*
