#!/usr/bin/env bash
# Every check that a change must pass, set up from nothing.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [options] [-- pytest options]

Sets up .venv (first time only), then runs formatting, lint, import and include contracts, types and the test suite.

  --all        also the tests marked slow
  --no-lint    tests alone
  --lint       lint, format, import contracts and types alone
  --sanitize   instead: build the C++ of the CPU operators with AddressSanitizer and UBSan into build/sanitize, make sure
               that they catch two deliberate mistakes, run the operators' tests, fail on any report (needs GCC)
  --cuda-build instead: build against torch's CUDA wheels in .venv-cuda (some gigabytes, the first time only), no GPU
               needed; test that build's operators, symbols and machine code, and the operators on the CPU
  --torch V    instead: the tests alone, with torch V (such as 2.11.0) in .venv-torch-V and an extension built for it;
               .venv and its extension stay as they are
  --python P   the same with the Python P (a command or a path); the environment is then named after both
  --help       this text

Everything after -- goes to pytest, for example: bash launch/test.sh --no-lint -- tests/mesh -k fold
TEXT
}

all=0 lint=1 tests=1 sanitize=0 cuda_build=0 torch="" python="" rest=()
while [[ $# -gt 0 ]]; do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
        --all) all=1; shift ;;
        --no-lint) lint=0; shift ;;
        --lint) tests=0; shift ;;
        --sanitize) sanitize=1 lint=0 tests=0; shift ;;
        --cuda-build) cuda_build=1 lint=0 tests=0; shift ;;
        --torch | --python)
            [[ $# -ge 2 && -n "$2" ]] || { echo "moetrain: $1 needs a value; see bash launch/test.sh --help." >&2; exit 2; }
            if [[ "$1" == --torch ]]; then torch="$2"; else python="$2"; fi
            shift 2
            ;;
        --help | -h) usage; exit 0 ;;
        --) shift; rest=("$@"); break ;;
        *) echo "moetrain: unknown option '$1'; see bash launch/test.sh --help." >&2; exit 2 ;;
    esac
done

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ "$cuda_build" == 1 && -z "$torch$python" ]]; then
    # shellcheck source=launch/cuda_build.sh
    source "$(dirname "${BASH_SOURCE[0]}")/cuda_build.sh"
    run_cuda_build "${rest[@]}"
    say "the CUDA build passed"
    exit 0
fi
pytest=(python -m pytest)
if [[ -n "$torch$python" ]]; then
    [[ "$tests$sanitize" == 10 ]] || fail "--torch and --python run the tests alone; leave out --lint and --sanitize." 2
    lint=0
    # shellcheck source=launch/other_torch.sh
    source "$(dirname "${BASH_SOURCE[0]}")/other_torch.sh"
    setup_other_torch "$torch" "$python"
    pytest+=(-o "pythonpath=tests benchmarks") # moetrain itself is where PYTHONPATH says
else
    setup_moetrain dev
fi
export PATH="$VENV/bin:$PATH"

check_lines() {
    ruff format --check --quiet . || fail "Python is not formatted; run: .venv/bin/ruff format ."
    ruff check --quiet . || fail "lint found something (above); run: .venv/bin/ruff check --fix ."
    find csrc launch tests -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
        xargs -0 clang-format --dry-run -Werror || fail "C++ is not formatted; run: clang-format -i on the files above."
    python launch/check_includes.py || fail "an include of csrc points up (above); see the rooms in launch/check_includes.py."
    shellcheck -x launch/*.sh benchmarks/*.sh findings/*.sh .ci/run || fail "shellcheck found something in the scripts (above)."
    lint-imports --no-logo || fail "an import points up (above); see the layers in pyproject.toml."
}

if [[ "$lint" == 1 ]]; then
    say "format, lint, import contracts, types"
    mypy >"$VENV/mypy.log" 2>&1 & # as long as all the others together
    types=$! failed=0
    (check_lines) || failed=1
    wait "$types" || failed=1
    cat "$VENV/mypy.log"
    [[ "$failed" == 0 ]] || fail "these checks did not pass (above); for types, see what mypy says."
fi

if [[ "$tests" == 1 ]]; then
    setup_cuda_tools
    if [[ -z "${GLOO_SOCKET_IFNAME:-}" && -d /sys/class/net/lo ]]; then export GLOO_SOCKET_IFNAME=lo; fi
    marks=(-m "not slow")
    if [[ "$all" == 1 ]]; then marks=(); fi
    if [[ ${#rest[@]} -gt 0 ]]; then
        "${pytest[@]}" "${marks[@]}" "${rest[@]}"
    else
        # A file of tests stays with one process, but for those of CUDA sources: what it sets up, references and ranks, is
        # made once. Ranks share the cores, so two processes with ranks of their own are enough.
        failed=0 cores="$(getconf _NPROCESSORS_ONLN)"
        "${pytest[@]}" "${marks[@]}" -n "$cores" tests/cuda || failed=1
        "${pytest[@]}" "${marks[@]}" -n "$cores" --dist loadfile tests/ops || failed=1
        "${pytest[@]}" "${marks[@]}" -n "$((cores < 2 ? cores : 2))" --dist loadfile --ignore tests/cuda --ignore tests/ops ||
            failed=1
        [[ "$failed" == 0 ]] || fail "tests failed (above)."
    fi
fi

if [[ "$sanitize" == 1 ]]; then
    # shellcheck source=launch/sanitize.sh
    source "$(dirname "${BASH_SOURCE[0]}")/sanitize.sh"
    run_sanitized "${rest[@]}"
fi
say "all checks passed"
