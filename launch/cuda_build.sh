# For test.sh --cuda-build: the extension built against a CUDA build of torch in .venv-cuda, and what can be tested of it
# without a GPU. Sourced after setup.sh, not run.
# shellcheck shell=bash

CUDA_BUILT="$MOETRAIN_ROOT/build/cuda" # objects, and the package that Python imports
CUDA_TESTS=(tests/cuda/test_cuda_build.py tests/ops)

# A torch with CUDA in an environment of its own: torch's wheels, the compiler of the same CUDA, what the tests need.
make_cuda_venv() {
    VENV="$MOETRAIN_ROOT/.venv-cuda" PY="$MOETRAIN_ROOT/.venv-cuda/bin/python"
    local cuda packages=()
    make_venv
    if ! "$PY" -c 'import torch; assert torch.version.cuda' 2>/dev/null; then
        if [[ -n "${MOETRAIN_TORCH_INDEX:-}" ]]; then export PIP_EXTRA_INDEX_URL="$MOETRAIN_TORCH_INDEX"; fi
        say "installing torch $TORCH_VERSION with CUDA, some gigabytes"
        # Three equals signs: not the same version with a label, such as +cpu.
        quiet_pip "torch===$TORCH_VERSION" numpy || fail "could not install torch $TORCH_VERSION ($(pip_reason))."
    fi
    cuda="$("$PY" -c 'import torch; print(torch.version.cuda or "")')"
    [[ -n "$cuda" ]] || fail "torch $TORCH_VERSION has no CUDA here; set MOETRAIN_TORCH_INDEX to an index that has it with CUDA."
    while read -r package; do packages+=("$package==$cuda.*"); done < <(
        grep -v '^#' "$MOETRAIN_ROOT/launch/nvcc_packages.txt" | tr ' ' '\n'
    )
    quiet_pip "${packages[@]}" || fail "could not install nvcc $cuda ($(pip_reason))."
    quiet_pip -c "$MOETRAIN_ROOT/launch/constraints.txt" "setuptools>=77,<82" ninja hypothesis pytest \
        pytest-timeout rich safetensors tyro || fail "could not install what the tests need ($(pip_reason))."
    setup_cuda_tool cuobjdump
}

build_with_cuda() {
    local log="$CUDA_BUILT/build.log"
    say "building the native extension with CUDA"
    mkdir -p "$CUDA_BUILT/package/moetrain"
    PATH="$VENV/bin:$PATH" MOETRAIN_BUILD_ISA=all "$PY" setup.py --quiet build_ext --build-temp "$CUDA_BUILT/objects" \
        --build-lib "$CUDA_BUILT/package" >"$log" 2>&1 || fail "the CUDA build failed; the whole story is in $log."
    link_package "$CUDA_BUILT/package"
}

# run_cuda_build [PYTEST OPTIONS]: what is named there replaces the tests above.
run_cuda_build() {
    if [[ $# -eq 0 ]]; then set -- "${CUDA_TESTS[@]}"; fi
    cd "$MOETRAIN_ROOT" || fail "cannot enter $MOETRAIN_ROOT."
    make_cuda_venv
    build_with_cuda
    export PYTHONPATH="$CUDA_BUILT/package" PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
    "$PY" -c 'import torch, moetrain._C as c; assert c.has_cuda' ||
        fail "the extension built with CUDA does not load (above)."
    "$PY" -m pytest -o pythonpath=tests -m "not slow and not gpu" "$@"
}
