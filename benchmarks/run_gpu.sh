#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for the present GPU, GPU tests, benchmarks beside plain torch, a
# short training run. Made to end well within 8 minutes; what each stage prints is flushed as it goes.
# Not yet run on a GPU.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bash benchmarks/run_gpu.sh [--stages LIST] [--out DIR]

  --stages LIST  of build,test,sanitize,ops,experts,rounding,step,train (default: all of them, in this order)
  --out DIR      where logs and results go (default benchmarks/results)
  --python PY    a Python with a CUDA build of torch, pybind11, ninja and pytest (default: .venv's, else python3)
  --help         this text

A failing stage does not stop the others; the exit code is the number of stages that failed. A stage that takes longer
than its share of the 8 minutes is ended; what it had measured by then is in its log.
TEXT
}

stages=build,test,sanitize,ops,experts,rounding,step,train out="" python=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --stages | --out | --python)
            [[ $# -ge 2 ]] || { echo "moetrain: $1 needs a value; see --help." >&2; exit 2; }
            case "$1" in --stages) stages="$2" ;; --out) out="$2" ;; *) python="$2" ;; esac
            shift 2
            ;;
        --help | -h) usage; exit 0 ;;
        *) echo "moetrain: unknown option '$1'; see bash benchmarks/run_gpu.sh --help." >&2; exit 2 ;;
    esac
done
for stage in ${stages//,/ }; do
    case "$stage" in
        build | test | sanitize | ops | experts | rounding | step | train) ;;
        *) echo "moetrain: unknown stage '$stage'; stages are build, test, sanitize, ops, experts, rounding, step, train." >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${out:-benchmarks/results}"
mkdir -p "$out"
if [[ -z "$python" ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null)" || {
    echo "moetrain: no GPU, or no CUDA build of torch in $python; run this where torch.cuda.is_available()." >&2
    exit 2
}
capability="$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
tag="$(tr 'A-Z ' 'a-z-' <<<"$gpu" | tr -cd 'a-z0-9-')"
echo "moetrain: $gpu, compute capability $capability, $("$python" -c 'import torch; print(torch.__version__)')"

# Seconds that a stage may take; their sum is the 8 minutes.
limit() {
    case "$1" in
        build) echo 150 ;; test) echo 60 ;; sanitize) echo 40 ;; ops) echo 30 ;;
        experts) echo 110 ;; rounding) echo 40 ;; step) echo 20 ;; train) echo 30 ;;
    esac
}

within() {
    local seconds
    seconds="$(limit "$1")"
    shift
    timeout --kill-after=5 "$seconds" "$@"
}

build() {
    local arch="$capability"
    if [[ "$arch" == 9.0 ]]; then arch=9.0a; fi
    TORCH_CUDA_ARCH_LIST="$arch" within build "$python" setup.py -q build_ext --inplace &&
        "$python" -c 'import torch, moetrain._C as c; assert c.has_cuda, "built without CUDA: is nvcc there?"'
}

run_tests() { within test "$python" -m pytest -q -m "gpu and not slow" -p no:cacheprovider tests/ops tests/placement tests/sequence; }

# Races and reads out of bounds, on small shapes.
sanitize() {
    local checker
    checker="$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")"
    if [[ ! -x "$checker" ]]; then
        echo "compute-sanitizer is not here; the stage is skipped"
        return 0
    fi
    within sanitize "$checker" --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x -m "gpu and not slow" \
        -p no:cacheprovider tests/ops/test_expert_mlp.py -k 'swiglu and not torch_compile'
}

ops() {
    within ops "$python" benchmarks/bench_routing_ops.py --device cuda --save-as "$tag" &&
        within ops "$python" benchmarks/bench_row_ops.py --device cuda --save-as "$tag"
}

# The twelve shapes of SonicMoE's tables. Peers that are not installed are left out.
experts() {
    within experts "$python" benchmarks/bench_experts.py --device cuda --shape all-gpu --rounds 5 \
        --peers unfused,hf-grouped --save-as "$tag" || return
    local saved
    saved="benchmarks/results/experts_${tag}_$(date +%Y%m).json"
    "$python" -c 'import matplotlib' 2>/dev/null && "$python" benchmarks/figures.py "$saved" --out "$out"
    return 0
}

rounding() { within rounding "$python" benchmarks/bench_rounding_gain.py --device cuda --rounds 5 --save-as "$tag"; }

step() {
    within step "$python" benchmarks/bench_step.py --preset quickstart --train.device cuda \
        --json "$out/step_${tag}_$(date +%Y%m).json"
}

train() {
    local work
    work="$(mktemp -d)"
    "$python" -m moetrain prep --quickstart --validation 0.02 --out "$work/corpus" &&
        within train "$python" -m moetrain train --preset quickstart --train.device cuda --train.steps 100 \
            --data.path "$work/corpus" --run-dir "$work/run" --train.final-eval-rows 256 &&
        cp "$work/run/summary.json" "$out/train_${tag}_$(date +%Y%m).json"
}

run_stage() {
    case "$1" in
        build) build ;;
        test) run_tests ;;
        sanitize) sanitize ;;
        ops) ops ;;
        experts) experts ;;
        rounding) rounding ;;
        step) step ;;
        train) train ;;
    esac
}

failed=0
for stage in ${stages//,/ }; do
    echo "== $stage"
    begun=$SECONDS
    if run_stage "$stage" 2>&1 | tee "$out/gpu_$stage.log"; then
        echo "== $stage: done in $((SECONDS - begun)) s"
    else
        echo "== $stage: FAILED after $((SECONDS - begun)) s"
        failed=$((failed + 1))
    fi
done
exit "$failed"
