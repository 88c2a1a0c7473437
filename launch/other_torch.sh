# For test.sh --torch and --python: the tests with another torch or another Python, in an environment of their own and
# with an extension built for it. Neither .venv nor moetrain/_C.abi3.so is touched. Sourced after setup.sh, not run.
# shellcheck shell=bash

# setup_other_torch [TORCH] [PYTHON]: "" is the torch, and the Python, that setup.sh would take.
setup_other_torch() {
    name_other_torch "$1" "${2:-${MOETRAIN_PYTHON:-}}"
    cd "$MOETRAIN_ROOT" || fail "cannot enter $MOETRAIN_ROOT."
    export MOETRAIN_BUILD_ISA="${MOETRAIN_BUILD_ISA:-all}"
    need_compiler
    local kernels=""
    if [[ ! -x "$PY" ]] || ! has_packages dev; then
        # shellcheck disable=SC2154,SC2046  # the jobs at the end
        trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
        make_venv
        install_packages dev ""
        has_wanted_torch
        state packages dev >"$VENV/packages-dev.stamp"
    fi
    has_wanted_torch
    build_for_other_torch
}

# Sets TORCH_VERSION, VENV, PY and OTHER_BUILT: the folder that Python imports moetrain from.
name_other_torch() { # TORCH PYTHON
    local name
    if [[ -n "$1" ]]; then
        [[ "$1" =~ ^[0-9]+\.[0-9]+\.[0-9]+((a|b|rc|\.dev)[0-9]+)?(\+[a-z0-9.]+)?$ ]] ||
            fail "--torch must be a whole version of torch, such as 2.11.0, got '$1'." 2
        TORCH_VERSION="$1"
    fi
    name="torch-$TORCH_VERSION"
    if [[ -n "$2" ]]; then
        name+="-python-$("$2" -c 'import sys; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
            fail "--python must name a Python of 3.11 or newer, got '$2'." 2
        MOETRAIN_PYTHON="$2"
    fi
    VENV="$MOETRAIN_ROOT/.venv-$name" PY="$MOETRAIN_ROOT/.venv-$name/bin/python"
    OTHER_BUILT="$MOETRAIN_ROOT/build/$name"
}

has_wanted_torch() {
    local found
    found="$("$PY" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" || found=none
    [[ "${found%%+*}" == "${TORCH_VERSION%%+*}" ]] ||
        fail "$VENV must have torch $TORCH_VERSION, and has $found; remove the folder and try again."
}

# The package is Python by links, file by file, so that byte code too is apart, beside the extension. The objects are in
# build/, as ever: in a folder per torch, and what needs no torch once.
build_for_other_torch() {
    local log="$VENV/build.log"
    if [[ -n "$kernels" ]]; then wait "$kernels" || true; fi
    say "building the native extension for torch $TORCH_VERSION"
    rm -rf "$OTHER_BUILT"
    mkdir -p "$OTHER_BUILT"
    cp -rs "$MOETRAIN_ROOT/moetrain" "$OTHER_BUILT/"
    find "$OTHER_BUILT" \( -name '*.so' -o -name '*.pyc' \) -delete
    PATH="$VENV/bin:$PATH" "$PY" setup.py --quiet build_ext --build-lib "$OTHER_BUILT" >"$log" 2>&1 ||
        fail "the build for torch $TORCH_VERSION failed; the whole story is in $log."
    # Not the folder that Python is started in, which has the extension of .venv.
    export PYTHONSAFEPATH=1 PYTHONPATH="$OTHER_BUILT:$MOETRAIN_ROOT:$MOETRAIN_ROOT/tests:$MOETRAIN_ROOT/benchmarks"
    "$PY" -c 'import sys, moetrain.train.loop, moetrain._C as c; sys.exit(not c.__file__.startswith(sys.argv[1]))' \
        "$OTHER_BUILT/" || fail "the extension built for torch $TORCH_VERSION does not load (above)."
}
