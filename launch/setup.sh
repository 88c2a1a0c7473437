# Shared by quickstart.sh and test.sh: make .venv, install torch and moetrain, build the extension.
# Sourced, not run. Everything is skipped when nothing that matters has changed since the last time.
# shellcheck shell=bash

MOETRAIN_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$MOETRAIN_ROOT/.venv"
PY="$VENV/bin/python"
TORCH_VERSION="${MOETRAIN_TORCH_VERSION:-2.13.0}"

# fail TEXT [EXIT_CODE]
fail() {
    echo "moetrain: $1" >&2
    exit "${2:-1}"
}

say() { echo "moetrain: $*" 2>/dev/null || true; }  # also where nobody reads it any more

# pip, with the index that the user may have named for torch.
quiet_pip() {
    local log="$VENV/pip.log"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$PY" -m pip install --quiet --progress-bar off "$@" >"$log" 2>&1
}

pip_reason() { grep -iE '^ *(error|fatal)' "$VENV/pip.log" | tail -n 1; }

find_python() {
    local candidate
    for candidate in ${MOETRAIN_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# A torch with CUDA that the machine's own Python already has is used as it is.
system_cuda_torch() {
    has_gpu && "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null
}

make_venv() {
    local python flags=()
    if [[ -x "$PY" ]] && "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
        "$PY" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    [[ -n "$python" ]] || fail "Python 3.11 or newer is needed and none was found; install it or set MOETRAIN_PYTHON to one."
    if system_cuda_torch "$python"; then flags=(--system-site-packages); fi
    say "creating $(basename "$VENV") with $("$python" --version)"
    "$python" -m venv --clear "${flags[@]}" "$VENV" ||
        fail "could not create $VENV; on Debian and Ubuntu, install the package python3-venv."
}

install_torch() {
    if "$PY" -c 'import torch' 2>/dev/null; then return; fi
    local try wanted=("torch==$TORCH_VERSION+cpu" "torch==$TORCH_VERSION")
    if has_gpu; then wanted=("torch==$TORCH_VERSION"); fi
    if [[ -n "${MOETRAIN_TORCH_INDEX:-}" ]]; then export PIP_EXTRA_INDEX_URL="$MOETRAIN_TORCH_INDEX"; fi
    for try in "${wanted[@]}"; do
        say "installing $try"
        if quiet_pip "$try" numpy; then return; fi  # without numpy, torch warns at every start
    done
    fail "could not install torch $TORCH_VERSION ($(pip_reason)); set MOETRAIN_TORCH_INDEX to a package index that has it, or install torch into .venv yourself."
}

# What decides whether anything must be installed or built again.
fingerprint() {
    {
        "$PY" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)'
        echo "$MOETRAIN_ROOT $1 ${MOETRAIN_BUILD_ISA:-}"
        cat "$MOETRAIN_ROOT/pyproject.toml" "$MOETRAIN_ROOT/setup.py" "$MOETRAIN_ROOT/launch/constraints.txt"
        find "$MOETRAIN_ROOT/csrc" "$MOETRAIN_ROOT/build_tools" -name __pycache__ -prune -o -type f -print | LC_ALL=C sort | xargs cat
    } | sha256sum | cut -d' ' -f1
}

need_compiler() {
    command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
        fail "a C++20 compiler is needed and none was found; on Debian and Ubuntu, install the package g++."
}

# One extension serves both: the stamp of what it was built for last is the only one.
is_up_to_date() {
    [[ -f "$1" && "$(cat "$1")" == "$(fingerprint "$2")" ]] && "$PY" -c 'import torch, moetrain._C' 2>/dev/null
}

# setup_moetrain EXTRAS: EXTRAS is "" or "dev". The tests run every instruction set that the machine has, and AMX's
# source without AMX; without them the extension is compiled for this machine alone, unless MOETRAIN_BUILD_ISA says more.
setup_moetrain() {
    local extras="$1" stamp="$VENV/moetrain-${1:-core}.stamp"
    cd "$MOETRAIN_ROOT" || fail "cannot enter $MOETRAIN_ROOT."
    make_venv
    install_torch
    if [[ -z "$extras" && -z "${MOETRAIN_BUILD_ISA:-}" ]] &&
        MOETRAIN_BUILD_ISA=all is_up_to_date "$VENV/moetrain-dev.stamp" dev; then return; fi
    if [[ "$extras" == dev ]]; then export MOETRAIN_BUILD_ISA="${MOETRAIN_BUILD_ISA:-all}"; fi
    if is_up_to_date "$stamp" "$extras"; then return; fi
    need_compiler
    say "installing moetrain and building its native extension"
    quiet_pip -c launch/constraints.txt "setuptools>=77" ninja ||
        fail "could not install the build tools ($(pip_reason)); check the network and .venv/pip.log."
    quiet_pip -c launch/constraints.txt --no-build-isolation -e ".${extras:+[$extras]}" ||
        fail "could not build or install moetrain ($(pip_reason)); the whole story is in .venv/pip.log."
    "$PY" -c 'import torch, moetrain._C' || fail "the native extension was built but does not load; remove .venv and build/ and try again."
    rm -f "$VENV"/moetrain-*.stamp
    fingerprint "$extras" >"$stamp"
}

# link_package FOLDER: moetrain's Python beside an extension that was built into FOLDER, by links.
link_package() {
    local entry
    find "$1/moetrain" -type l -delete
    for entry in "$MOETRAIN_ROOT"/moetrain/*; do
        case "$entry" in
            *.so | *__pycache__) ;;
            *) ln -s "$entry" "$1/moetrain/" ;;
        esac
    done
}

# What the compile gate needs, no GPU: nvcc, and nvdisasm to read what it made. Take the machine's, else install them
# from pip packages. The places are those where tests/cuda looks.
setup_cuda_tools() {
    setup_nvcc
    local packaged
    if command -v nvdisasm >/dev/null 2>&1 || [[ -n "${CUDA_HOME:-}" && -f "$CUDA_HOME/bin/nvdisasm" ]]; then return; fi
    for packaged in "$VENV"/lib/python3*/site-packages/nvidia/*/bin/nvdisasm; do
        if [[ -f "$packaged" ]]; then return; fi
    done
    say "installing nvdisasm"
    quiet_pip --no-deps nvidia-cuda-nvdisasm ||
        fail "could not install nvdisasm ($(pip_reason)); install the CUDA toolkit or set CUDA_HOME."
}

setup_nvcc() {
    local packaged packages
    if command -v nvcc >/dev/null 2>&1 || [[ -n "${CUDA_HOME:-}" && -f "$CUDA_HOME/bin/nvcc" ]]; then return; fi
    if [[ -z "${CUDA_HOME:-}" && -f /usr/local/cuda/bin/nvcc ]]; then
        export CUDA_HOME=/usr/local/cuda
        return
    fi
    for packaged in "$VENV"/lib/python3*/site-packages/nvidia/*/bin/nvcc; do
        if [[ -f "$packaged" ]]; then return; fi
    done
    say "installing nvcc"
    read -ra packages < <(grep -v '^#' "$MOETRAIN_ROOT/launch/nvcc_packages.txt")
    quiet_pip "${packages[@]}" || fail "could not install nvcc ($(pip_reason)); install the CUDA toolkit or set CUDA_HOME."
}
