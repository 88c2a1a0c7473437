#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for the present GPU, every operator once, GPU tests, compute-sanitizer,
# benchmarks, a short training run. Made to end well within 8 minutes; what each stage prints is flushed as it goes.
# Rehearsed without a GPU, stage by stage, by --rehearse.
set -uo pipefail

ALL=build,smoke,test,sanitize,ring,ops,experts,peers,rounding,step,train

usage() {
    cat <<TEXT
usage: bash benchmarks/run_gpu.sh [--stages LIST] [--out DIR] [--python PY] [--rehearse]

  --stages LIST  of $ALL (default: all, in this order)
  --out DIR      where logs and results go (default benchmarks/results)
  --python PY    a Python with a CUDA build of torch, setuptools 77 or newer, pybind11, ninja, pytest, pytest-timeout
                 and hypothesis (default: .venv's, else python3); where pytest-xdist is there too, tests run beside
                 each other
  --rehearse     on the CPU with tiny sizes and nothing built, to see that every stage works; results go to a scratch
                 folder unless --out names one
  --help         this text

  build      the extension, for this GPU's architecture and no other
  smoke      every operator once against the CPU, each in a process of its own
  test       the tests marked gpu, without the slow ones
  sanitize   memcheck of compute-sanitizer over the operators of smoke
  ring       attention of gangs of 3 and 8 ranks, threads of one process, against fp64, and what it takes
  ops        moves, router and single operators, against a copy of as many bytes and against torch
  experts    expert_mlp on the 12 shapes of SonicMoE's tables beside torch, and beside the published TFLOP/s
  peers      on some of them beside our other paths and other libraries' kernels, where those are installed
  rounding   what token rounding gains on its four sweeps
  step       tokens per second of a training step
  train      100 steps on text of this machine

A failing stage does not stop the others; the exit code is the number of stages that failed. A stage that takes longer
than its share of the 8 minutes is ended; what it had measured by then is in its log and its results.
TEXT
}

stages=$ALL out="" python="" rehearse=0
while [[ $# -gt 0 ]]; do
    case "$1" in
        --stages | --out | --python)
            [[ $# -ge 2 ]] || { echo "moetrain: $1 needs a value; see --help." >&2; exit 2; }
            case "$1" in --stages) stages="$2" ;; --out) out="$2" ;; *) python="$2" ;; esac
            shift 2
            ;;
        --rehearse) rehearse=1; shift ;;
        --help | -h) usage; exit 0 ;;
        *) echo "moetrain: unknown option '$1'; see bash benchmarks/run_gpu.sh --help." >&2; exit 2 ;;
    esac
done
for stage in ${stages//,/ }; do
    case ",$ALL," in
        *",$stage,"*) ;;
        *) echo "moetrain: unknown stage '$stage'; stages are ${ALL//,/, }." >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -z "$python" ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Sizes: whole ones, or those of a rehearsal.
if [[ "$rehearse" == 1 ]]; then
    device=cpu capability=9.0 tag=rehearsal
    out="${out:-$(mktemp -d)}"
    smoke_limits=(--at-once 2 --seconds 120) move_sizes=(--shrink 32 --rounds 1) op_rounds=1
    expert_sizes=(--shape cpu-quickstart --rounds 1) peer_sizes=(--shape cpu-quickstart --rounds 1)
    rounding_sizes=(--tokens 512 --only D1536-F256-K8-E64 --rounds 1) step_sizes=(--rounds 1 --warm-up 1)
    ring_sizes=(--rounds 1) train_sizes=(--train.steps 2 --optim.warmup-steps 1 --train.final-eval-rows 2)
    echo "moetrain: a rehearsal on the CPU, results in $out"
else
    gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null)" || {
        echo "moetrain: no GPU, or no CUDA build of torch in $python; run this where torch.cuda.is_available()." >&2
        exit 2
    }
    device=cuda capability="$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
    tag="$(tr 'A-Z ' 'a-z-' <<<"$gpu" | tr -cd 'a-z0-9-')"
    out="${out:-benchmarks/results}"
    smoke_limits=(--at-once 9 --seconds 13) move_sizes=(--rounds 11) op_rounds=11
    expert_sizes=(--shape all-gpu --rounds 5 --seconds 78)
    peer_sizes=(--shape 7B-f512 --shape 30B-f512 --shape 1.4B-f256 --rounds 5 --seconds 22)
    rounding_sizes=(--rounds 5) ring_sizes=(--rounds 5) step_sizes=() train_sizes=(--train.steps 100 --train.final-eval-rows 256)
    echo "moetrain: $gpu, compute capability $capability, torch $("$python" -c 'import torch; print(torch.__version__)')"
    nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv 2>/dev/null
fi
mkdir -p "$out"
MOETRAIN_RESULTS="$(cd "$out" && pwd)"
export MOETRAIN_RESULTS
month="$(date +%Y%m)"

# Seconds that a stage may take; their sum leaves 20 of the 8 minutes to pictures, probes and endings.
limit() {
    case "$1" in
        build) echo 130 ;; smoke) echo 30 ;; test) echo 55 ;; sanitize) echo 25 ;; ring) echo 15 ;; ops) echo 35 ;;
        experts) echo 88 ;; peers) echo 27 ;; rounding) echo 25 ;; step) echo 12 ;; train) echo 18 ;;
    esac
}

# within COMMAND...: the command, interrupted when the stage's time is over, so that it can still say what it found, then
# ended. A rehearsal may take ten times as long.
within() {
    local seconds=$((stage_end - SECONDS))
    timeout --signal=INT --kill-after=5 "$((seconds > 1 ? seconds : 1))" "$@"
}

has() { "$python" -c "import $1" 2>/dev/null; }

build() {
    local arch="$capability"
    if [[ "$arch" == 9.0 ]]; then arch=9.0a; fi
    if [[ "$rehearse" == 1 ]]; then
        TORCH_CUDA_ARCH_LIST="$arch" within "$python" setup.py -q --version &&
            "$python" -c 'import torch, moetrain._C as c; print("has_cuda:", c.has_cuda)'
        return
    fi
    "$python" -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77, s.__version__' ||
        { echo "moetrain: the build needs setuptools 77 or newer: pip install 'setuptools>=77,<82'" >&2; return 1; }
    TORCH_CUDA_ARCH_LIST="$arch" within "$python" setup.py -q build_ext --inplace &&
        "$python" -c 'import torch, moetrain._C as c; assert c.has_cuda, "built without CUDA: is nvcc there?"'
}

smoke() { within "$python" benchmarks/gpu_smoke.py --device "$device" "${smoke_limits[@]}"; }

# A kernel that hangs must not take the others' tests with it: the thread method ends its process, xdist starts another.
run_tests() {
    local how=(-q -p no:cacheprovider -m "gpu and not slow" --timeout 25 --timeout-method thread)
    if has xdist; then how+=(-n 6 --max-worker-restart 30); fi
    if [[ "$rehearse" == 1 ]]; then how=(-q -p no:cacheprovider -m "gpu and not slow" --collect-only); fi
    within "$python" -m pytest "${how[@]}" tests/ops tests/placement tests/sequence
}

# Reads and writes out of bounds, on small shapes.
sanitize() {
    local checker check=()
    checker="$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")"
    if [[ "$rehearse" == 0 ]]; then
        if [[ ! -x "$checker" ]]; then
            echo "compute-sanitizer is not here; the stage is skipped"
            return 0
        fi
        check=("$checker" --tool memcheck --error-exitcode 9)
    fi
    within "${check[@]}" "$python" benchmarks/gpu_smoke.py --device "$device" --here
}

ring() { within "$python" benchmarks/gpu_ring.py --device "$device" "${ring_sizes[@]}" --save-as "$tag"; }

ops() {
    local code=0
    within "$python" benchmarks/bench_bandwidth.py --device "$device" "${move_sizes[@]}" --save-as "$tag" || code=1
    within "$python" benchmarks/bench_routing_ops.py --device "$device" --rounds "$op_rounds" --save-as "$tag" || code=1
    within "$python" benchmarks/bench_row_ops.py --device "$device" --rounds "$op_rounds" --save-as "$tag" || code=1
    return "$code"
}

# Peers that are not installed are left out.
experts() {
    within "$python" benchmarks/bench_experts.py --device "$device" "${expert_sizes[@]}" \
        --peers hf-grouped --save-as "$tag"
    draw "experts_${tag}_$month.json" "$?"
}

# Apart from the stage before, since another library's kernel that breaks the GPU's context would end that one too.
peers() {
    within "$python" benchmarks/bench_experts.py --device "$device" "${peer_sizes[@]}" \
        --peers path-sm80,path-grouped_mm,bmm,liger,scattermoe,sonicmoe,quack --save-as "$tag-peers"
    draw "experts_${tag}-peers_$month.json" "$?"
}

# draw FILE CODE: a picture of what was measured, even where a shape was left out; fails where CODE says that one was.
draw() {
    if [[ ! -f "$out/$1" ]]; then
        echo "there is no $1, and no picture"
    elif ! has matplotlib; then
        echo "matplotlib is not here; no picture is drawn"
    else
        timeout 10 "$python" benchmarks/figures.py "$out/$1" --out "$out" || return 1
    fi
    return "$2"
}

rounding() {
    within "$python" benchmarks/bench_rounding_gain.py --device "$device" "${rounding_sizes[@]}" --save-as "$tag"
}

step() {
    within "$python" benchmarks/bench_step.py --preset quickstart --train.device "$device" "${step_sizes[@]}" \
        --json "$out/step_${tag}_$month.json"
}

train() {
    if ! has tyro; then
        echo "tyro is not here, and moetrain prep needs it; the stage is skipped"
        return 0
    fi
    local work
    work="$(mktemp -d)"
    within "$python" -m moetrain prep --quickstart --validation 0.02 --out "$work/corpus" &&
        within "$python" -m moetrain train --preset quickstart --train.device "$device" "${train_sizes[@]}" \
            --data.path "$work/corpus" --run-dir "$work/run" &&
        cp "$work/run/summary.json" "$out/train_${tag}_$month.json"
}

run_stage() {
    case "$1" in
        build) build ;;
        smoke) smoke ;;
        test) run_tests ;;
        sanitize) sanitize ;;
        ring) ring ;;
        ops) ops ;;
        experts) experts ;;
        peers) peers ;;
        rounding) rounding ;;
        step) step ;;
        train) train ;;
    esac
}

failed=()
for stage in ${stages//,/ }; do
    echo "== $stage"
    begun=$SECONDS stage_end=$((SECONDS + $(limit "$stage") * (rehearse ? 10 : 1)))
    if run_stage "$stage" 2>&1 | tee "$out/gpu_$stage.log"; then
        echo "== $stage: done in $((SECONDS - begun)) s"
    else
        echo "== $stage: FAILED after $((SECONDS - begun)) s"
        failed+=("$stage")
    fi
done
echo "moetrain: $SECONDS s in all, results in $out, ${#failed[@]} stages failed${failed[*]:+: ${failed[*]}}"
exit "${#failed[@]}"
