#!/usr/bin/env bash
# From a fresh clone to a wheel and a source distribution, in one command.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/wheel.sh [options]

Sets up .venv as far as a build needs it, makes a source distribution, builds from that, and from nothing else, a wheel
for this kind of processor with the kernels of every instruction set, and names it by the oldest manylinux that it runs
on. The wheel has no CUDA kernels, holds no part of torch, and asks for the minor version of torch that it was built with.

Then tries the wheel: installs it into a new environment in a temporary folder, without a compiler on the path and with
nothing of this clone in reach, runs the operators' tests and trains a tiny model on two ranks, both by the best
instruction set of this machine and by the portable kernels.

  --out DIR   where the two files go (default dist)
  --no-try    make the wheel and leave it untried
  --try FILE  try that wheel and make none
  --help      this text

Environment: MOETRAIN_PYTHON names the Python to use, MOETRAIN_TORCH_VERSION the torch to build with,
MOETRAIN_TORCH_INDEX a package index that has it.
TEXT
}

wrong() {
    echo "moetrain: $1; see bash launch/wheel.sh --help." >&2
    exit 2
}

out="" try=1 wheel=""
while [[ $# -gt 0 ]]; do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
        --out | --try)
            [[ $# -ge 2 && -n "$2" ]] || wrong "$1 needs a value"
            path="$2"
            if [[ "$path" != /* ]]; then path="$PWD/$path"; fi # from where the user stands
            if [[ "$1" == --out ]]; then out="$path"; else wheel="$path"; fi
            shift 2
            ;;
        --no-try) try=0; shift ;;
        --help | -h) usage; exit 0 ;;
        *) wrong "unknown option '$1'" ;;
    esac
done
[[ -z "$wheel" || "$wheel" == *.whl ]] || wrong "--try must name a wheel, a file that ends in .whl, got '$wheel'"
[[ -z "$wheel" || -f "$wheel" ]] || wrong "--try: there is no file $wheel"
[[ -z "$wheel" || "$try" == 1 && -z "$out" ]] || wrong "--try makes no wheel, so --out and --no-try have no place beside it"

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/wheel_try.sh
source "$(dirname "${BASH_SOURCE[0]}")/wheel_try.sh"
[[ "$(uname -s)" == Linux ]] || fail "wheels are made on Linux alone, and this is $(uname -s)."
cd "$MOETRAIN_ROOT"
unset PYTHONPATH
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

setup_build() {
    local requirements
    need_compiler
    make_venv
    mapfile -t requirements < <("$PY" -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["build-system"]["requires"], *project["project"]["optional-dependencies"]["release"], sep="\n")')
    quiet_pip -c launch/constraints.txt "${requirements[@]}" ||
        fail "could not install the build tools ($(pip_reason)); check the network and .venv/pip.log."
    install_torch
}

# torch comes with the environment, beside the wheel: its libraries are neither copied in nor looked for.
build_wheel() {
    local log="$VENV/wheel.log" raw
    say "building the source distribution, and the wheel from it"
    # -P: build/ is also the name of a folder here
    MOETRAIN_BUILD_ISA=all MOETRAIN_BUILD_CUDA=0 "$PY" -P -m build --no-isolation --outdir "$work/raw" . >"$log" 2>&1 ||
        fail "could not build the wheel ($(grep -m 1 -E '(error|ERROR):? ' "$log")); the whole story is in .venv/wheel.log."
    raw=("$work"/raw/*.whl)
    PATH="$VENV/bin:$PATH" "$PY" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
        --wheel-dir "$work/named" "${raw[0]}" >>"$log" 2>&1 ||
        fail "the wheel fits no manylinux ($(tail -n 1 "$log")); the whole story is in .venv/wheel.log."
    cp "$work"/raw/*.tar.gz "$work"/named/*.whl "$out/" || fail "cannot write to $out; is there no space left?"
    raw=("$work"/named/*.whl)
    wheel="$out/$(basename "${raw[0]}")"
    say "made $wheel ($(du -k "$wheel" | cut -f 1) KiB)"
}

if [[ -z "$wheel" ]]; then
    out="${out:-$MOETRAIN_ROOT/dist}"
    mkdir -p "$out" 2>/dev/null && [[ -w "$out" ]] || fail "cannot write to $out; name another folder with --out."
    setup_build
    build_wheel
fi
if [[ "$try" == 1 ]]; then try_wheel "$wheel" "$work/try"; fi
