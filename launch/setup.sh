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

# pip, with the index that the user may have named for torch. Byte code is compiled for what is imported, when it is:
# for all of torch it would take as long as unpacking it three times.
quiet_pip() {
    local log="$VENV/pip.log"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$PY" -m pip install --quiet --progress-bar off --no-compile "$@" >"$log" 2>&1
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

# A torch with CUDA that the machine's own Python already has is used as it is, in .venv.
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
    if [[ "$VENV" == "$MOETRAIN_ROOT/.venv" ]] && system_cuda_torch "$python"; then flags=(--system-site-packages); fi
    say "creating $(basename "$VENV") with $("$python" --version)"
    "$python" -m venv --clear "${flags[@]}" "$VENV" ||
        fail "could not create $VENV; on Debian and Ubuntu, install the package python3-venv."
}

state() { "$PY" "$MOETRAIN_ROOT/launch/setup_state.py" "$@"; }

install_torch() {
    local try wanted=("torch==$TORCH_VERSION+cpu" "torch==$TORCH_VERSION")
    if state extension >/dev/null 2>&1; then return; fi # a torch is there
    if has_gpu; then wanted=("torch==$TORCH_VERSION"); fi
    if [[ -n "${MOETRAIN_TORCH_INDEX:-}" ]]; then export PIP_EXTRA_INDEX_URL="$MOETRAIN_TORCH_INDEX"; fi
    if [[ "$TORCH_VERSION" == *+* ]]; then wanted=("torch==$TORCH_VERSION"); fi
    for try in "${wanted[@]}"; do
        say "installing $try"
        if quiet_pip "$try" numpy; then return; fi # without numpy, torch warns at every start
    done
    fail "could not install torch $TORCH_VERSION ($(pip_reason)); set MOETRAIN_TORCH_INDEX to a package index that has it, or install torch into $VENV yourself."
}

need_compiler() {
    command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
        fail "a C++20 compiler is needed and none was found; on Debian and Ubuntu, install the package g++."
}

# Stamps hold the hash of what the last set-up that ended well was made of. With MOETRAIN_BUILD_ISA unset, an extension
# for all instruction sets will do.
has_packages() {
    local now
    now="$(state packages "$1" 2>/dev/null)" && [[ "$(cat "$VENV/packages-${1:-core}.stamp" 2>/dev/null)" == "$now" ]]
}

has_extension() {
    local isa built
    built="$(cat "$VENV/extension.stamp" 2>/dev/null)" && [[ -f "$MOETRAIN_ROOT/moetrain/_C.abi3.so" ]] || return 1
    for isa in "${MOETRAIN_BUILD_ISA:-}" ${MOETRAIN_BUILD_ISA:-all}; do
        if [[ "$(MOETRAIN_BUILD_ISA="$isa" state extension 2>/dev/null)" == "$built" ]]; then return; fi
    done
    return 1
}

# Waits for what ran beside the set-up, and tells what it said.
end_meanwhile() {
    local failed=0
    if [[ -n "$meanwhile" ]]; then
        wait "$meanwhile" || failed=1
        cat "$VENV/meanwhile.log"
    fi
    trap - EXIT
    [[ "$failed" == 0 ]] || exit 1
}

# What needs no torch, kernels and the caller's MEANWHILE, runs beside pip, which uses one core and waits for the disk.
install_packages() { # EXTRAS MEANWHILE
    local requirements
    mapfile -t requirements < <(state requirements "$1")
    say "installing packages"
    quiet_pip -c launch/constraints.txt "setuptools>=77" ninja ||
        fail "could not install the build tools ($(pip_reason)); check the network and $VENV/pip.log."
    "$PY" -m launch.native.kernels >"$VENV/kernels.log" 2>&1 & # what fails here is compiled, and told, later
    kernels=$!
    quiet_pip -c launch/constraints.txt "${requirements[@]}" ||
        fail "could not install what moetrain needs ($(pip_reason)); check the network and $VENV/pip.log."
    if [[ -n "$2" ]]; then
        "$2" >"$VENV/meanwhile.log" 2>&1 &
        meanwhile=$!
    fi
    install_torch
}

# Byte code of what a training imports, for all processes to come, whatever the user's own processes write. The import
# also shows that the extension loads.
warm() { env -u PYTHONDONTWRITEBYTECODE "$PY" -c "$1"; }

build_extension() {
    if [[ -n "$kernels" ]]; then wait "$kernels" || true; fi
    say "building moetrain's native extension"
    "$PY" setup.py --quiet build_ext --inplace >"$VENV/build.log" 2>&1 ||
        fail "could not build the native extension ($(grep -m 1 -E 'error|fatal' "$VENV/build.log")); the whole story is in $VENV/build.log."
    warm 'import moetrain.cli.train, moetrain.train.loop' ||
        fail "the native extension was built but does not load; remove .venv and build/ and try again."
    state extension >"$VENV/extension.stamp"
}

# setup_moetrain EXTRAS [MEANWHILE]: EXTRAS is "" or "dev"; MEANWHILE is a function that needs moetrain's Python alone,
# and runs beside a first set-up. The tests run every instruction set that the machine has, and AMX's source without
# AMX; without them the extension is compiled for this machine alone, unless MOETRAIN_BUILD_ISA says more.
setup_moetrain() {
    local extras="$1" packages=1 kernels="" meanwhile=""
    cd "$MOETRAIN_ROOT" || fail "cannot enter $MOETRAIN_ROOT."
    if [[ "$extras" == dev ]]; then export MOETRAIN_BUILD_ISA="${MOETRAIN_BUILD_ISA:-all}"; fi
    if [[ -x "$PY" ]] && has_packages "$extras"; then packages=0; fi
    if [[ "$packages" == 0 ]] && has_extension; then return; fi
    need_compiler
    if [[ "$packages" == 1 ]]; then
        # shellcheck disable=SC2154,SC2046  # the jobs at the end
        trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
        make_venv
        install_packages "$extras" "${2:-}"
        warm 'import torch.distributed.fsdp, torch.distributed.tensor' 2>/dev/null &
        build_extension
        quiet_pip --no-deps --no-build-isolation -e . ||
            fail "could not install moetrain ($(pip_reason)); the whole story is in $VENV/pip.log."
        state packages "$extras" >"$VENV/packages-${extras:-core}.stamp"
        end_meanwhile
    else
        build_extension
    fi
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
    setup_cuda_tool nvdisasm
    if grep -qs libcudart "${OTHER_BUILT:-$MOETRAIN_ROOT}/moetrain/_C.abi3.so"; then setup_cuda_tool cuobjdump; fi
}

setup_cuda_tool() { # nvdisasm or cuobjdump: from the toolkit, or the package of its name
    local packaged
    if command -v "$1" >/dev/null 2>&1 || [[ -n "${CUDA_HOME:-}" && -f "$CUDA_HOME/bin/$1" ]]; then return; fi
    for packaged in "$VENV"/lib/python3*/site-packages/nvidia/*/bin/"$1"; do
        if [[ -f "$packaged" ]]; then return; fi
    done
    say "installing $1"
    quiet_pip --no-deps "nvidia-cuda-$1" ||
        fail "could not install $1 ($(pip_reason)); install the CUDA toolkit or set CUDA_HOME."
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
