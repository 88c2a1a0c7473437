#!/usr/bin/env bash
# From a fresh clone to a trained MoE language model, in one command.
set -euo pipefail
trap '' PIPE  # a closed output, as of `| head`, ends nothing: the ranks train on

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [options] [-- moetrain train options]

Sets up .venv (first time only), prepares a corpus from text found on this machine, and trains a small
Mixture-of-Experts language model with expert parallelism under torchrun: on GPUs with NCCL where there are any,
else on the CPU with gloo.

  --steps N      optimizer steps (default 300)
  --ranks N      processes (default 2; on GPUs, as many as there are, at most 2)
  --ep N         ranks that share the experts (default: the number of ranks)
  --run-dir DIR  where metrics, checkpoints and summary.json go (default runs/quickstart)
  --corpus DIR   prepared corpus (default corpora/quickstart; made when missing)
  --fresh        start over: move the run in an existing run folder aside instead of resuming it
  --dry-run      set up, then print the training command without running it
  --help         this text

Environment: MOETRAIN_PYTHON names the Python to use, MOETRAIN_TORCH_INDEX a package index for torch.
A second run is fast: it resumes, or shows the finished run again.
TEXT
}

steps=300 ranks="" ep="" run_dir=runs/quickstart corpus=corpora/quickstart fresh=0 dry_run=0 rest=()

value_of() {
    [[ $# -ge 2 && -n "$2" ]] || { echo "moetrain: $1 needs a value; see --help." >&2; exit 2; }
    echo "$2"
}

whole_number() {
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || { echo "moetrain: $1 must be a whole number of at least 1, got '$2'." >&2; exit 2; }
}

# A path that the user names is meant from where the user stands; the defaults are in this repository.
path_of() {
    local path
    path="$(value_of "$@")" || exit $?
    case "$path" in /*) echo "$path" ;; *) echo "$PWD/$path" ;; esac
}

while [[ $# -gt 0 ]]; do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
        --steps) steps="$(value_of "$@")"; shift 2 ;;
        --ranks) ranks="$(value_of "$@")"; shift 2 ;;
        --ep) ep="$(value_of "$@")"; shift 2 ;;
        --run-dir) run_dir="$(path_of "$@")"; shift 2 ;;
        --corpus) corpus="$(path_of "$@")"; shift 2 ;;
        --fresh) fresh=1; shift ;;
        --dry-run) dry_run=1; shift ;;
        --help | -h) usage; exit 0 ;;
        --) shift; rest=("$@"); break ;;
        *) echo "moetrain: unknown option '$1'; see bash launch/quickstart.sh --help." >&2; exit 2 ;;
    esac
done

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ -z "$ranks" ]]; then
    ranks=2
    if has_gpu; then
        gpus="$(nvidia-smi -L | grep -c GPU)"
        ranks=$((gpus < 2 ? gpus : 2))
    fi
fi
ep="${ep:-$ranks}"
whole_number --steps "$steps"
whole_number --ranks "$ranks"
whole_number --ep "$ep"
((ranks % ep == 0)) || fail "--ep ($ep) must divide --ranks ($ranks); choose --ep 1 or --ep $ranks." 2

prepare_corpus() {
    if [[ -f "$corpus/manifest.json" ]]; then return; fi
    say "preparing a corpus from text found on this machine"
    "$PY" -m moetrain prep --quickstart --validation 0.02 --out "$corpus" || fail "could not prepare a corpus in $corpus."
}

setup_moetrain "" prepare_corpus
prepare_corpus

# One machine: rendezvous and gloo stay on the loopback interface unless told otherwise.
if [[ -z "${GLOO_SOCKET_IFNAME:-}" && -d /sys/class/net/lo ]]; then export GLOO_SOCKET_IFNAME=lo; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

warmup=$((steps < 40 ? steps / 2 : 20))
options=(--preset quickstart --mesh.ep "$ep" --train.steps "$steps" --optim.warmup-steps "$warmup"
    --data.path "$corpus" --run-dir "$run_dir" "${rest[@]}")
command=("$PY" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m moetrain train "${options[@]}")
if [[ "$dry_run" == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# Mistakes are told, and a finished run is shown again or moved aside, before any rank is started.
check=(--check "$ranks")
if [[ "$fresh" == 1 ]]; then check+=(--fresh); fi
verdict=0
"$PY" -m moetrain train "${check[@]}" "${options[@]}" || verdict=$?
case "$verdict" in
    0)
        mkdir -p "$run_dir" 2>/dev/null || fail "cannot create the run folder $run_dir; name another with --run-dir."
        exec "${command[@]}"
        ;;
    3) say "this run is finished; --fresh trains it anew." ;;
    *) exit "$verdict" ;;
esac
