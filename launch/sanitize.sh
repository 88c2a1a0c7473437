# For test.sh --sanitize: the CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the
# normal build and run with the sanitizers' runtimes loaded into an ordinary Python and an ordinary torch.
# Sourced after setup.sh, not run.
# shellcheck shell=bash

SANITIZED="$MOETRAIN_ROOT/build/sanitize" # objects, and the package that Python imports
SANITIZED_TESTS=(tests/ops tests/moe/test_experts.py tests/moe/routers tests/moe/test_checkpointing.py
    tests/placement/test_sparse_plans.py tests/placement/test_sparse.py tests/placement/test_sparse_in_flight.py
    --deselect tests/placement/test_sparse_in_flight.py::test_memory_does_not_grow_with_plans) # freed memory is kept, to be watched

# The runtimes must come first in a process that was not built with them. libstdc++ too, or the first C++ exception,
# which is how operators refuse arguments, finds AddressSanitizer without the real __cxa_throw.
sanitizer_runtimes() {
    local name path
    for name in libasan.so libubsan.so libstdc++.so; do
        path="$("${CXX:-c++}" -print-file-name="$name")"
        [[ "$path" == /* ]] ||
            fail "${CXX:-c++} has no $name; install GCC and its sanitizer libraries, and set CXX to its g++."
        echo "$path"
    done | paste -sd ' '
}

build_sanitized() {
    say "building the native extension with sanitizers"
    mkdir -p "$SANITIZED/package/moetrain"
    MOETRAIN_SANITIZE=1 MOETRAIN_BUILD_ISA=all "$PY" setup.py --quiet build_ext --build-temp "$SANITIZED/objects" \
        --build-lib "$SANITIZED/package" >"$SANITIZED/build.log" 2>&1 ||
        fail "the sanitized build failed; the whole story is in $SANITIZED/build.log."
    link_package "$SANITIZED/package"
}

# sanitized COMMAND...: a report ends the process with an error. Leaks are not looked for, since Python and torch keep
# memory until the process ends.
sanitized() {
    env LD_PRELOAD="$runtimes" PYTHONPATH="$SANITIZED/package" PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "$@"
}

# A run that finds nothing says something only if mistakes are found.
check_canaries() {
    local mistake report="$SANITIZED/canary.log"
    sanitized "$PY" tests/sanitizer/canary.py fine || fail "the sanitized extension does not work (above)."
    for mistake in read:heap-buffer-overflow "overflow:signed integer overflow"; do
        if sanitized "$PY" tests/sanitizer/canary.py "${mistake%%:*}" >"$report" 2>&1 ||
            ! grep -q "${mistake#*:}" "$report"; then
            fail "the sanitizers missed a deliberate mistake ($mistake), see $report; is ${CXX:-c++} GCC 12 or newer?"
        fi
    done
    say "the sanitizers catch a read past the end and an overflow"
}

# run_sanitized [PYTEST OPTIONS]: what is named there replaces the tests above.
run_sanitized() {
    local runtimes
    runtimes="$(sanitizer_runtimes)" || exit 1
    if [[ $# -eq 0 ]]; then set -- "${SANITIZED_TESTS[@]}"; fi
    build_sanitized
    check_canaries
    # Pytest must leave stderr to the reports, and segmentation faults to AddressSanitizer, which tells their cause.
    sanitized "$PY" -m pytest -o pythonpath=tests --capture=sys -p no:faulthandler -m "not slow" "$@" ||
        fail "the sanitizers reported something, or a test failed in the sanitized build (above)."
}
