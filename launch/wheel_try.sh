# For wheel.sh: a wheel in a new environment, in a temporary folder, without a compiler and without this clone.
# Sourced after setup.sh, not run.
# shellcheck shell=bash

COMPILERS=(c++ g++ gcc cc clang clang++ ninja nvcc)
TOOLS=(bash sh env uname) # what else is on the path
# What compiles C++ of csrc, which is not in the wheel. All other tests of operators run.
UNTRIED=(tests/ops/test_top_k_row.py)

# The environment: torch chosen as for a clone, the wheel with all that it asks for, and what the tests need.
install_wheel() { # WHEEL
    VENV="$tried/venv"
    PY="$VENV/bin/python"
    cp "$1" "$tried/"
    make_venv
    install_torch
    quiet_pip "$tried/$(basename "$1")" hypothesis "pytest>=8" pytest-timeout pytest-xdist ||
        fail "could not install the wheel ($(pip_reason)); it asks for $(asks_for "$1")."
    "$PY" -m pip check >"$tried/check.log" || fail "the wheel does not fit what it was installed with: $(cat "$tried/check.log")."
}

asks_for() { "$PY" -c '
import email, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
asked = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
print(", ".join(line for line in asked if "extra ==" not in line))' "$1"; }

# From here on every Python of the environment refuses to read a file of the clone, and says so in the file refused.
forbid_clone() {
    local site
    site="$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    cp "$MOETRAIN_ROOT/launch/refuse_folder.py" "$site/"
    echo "import refuse_folder; refuse_folder.install()" >"$site/refuse_folder.pth"
}

# in_try COMMAND...: with nothing of the caller's environment but the number of threads and, where set, the instruction
# set. The tests are told that all of them are compiled in, so that a missing one fails.
in_try() {
    (cd "$tried" && env -i HOME="$tried" TMPDIR="$tried/tmp" LANG=C.UTF-8 PATH="$tried/venv/bin:$tried/tools" \
        REFUSED_FOLDER="$MOETRAIN_ROOT" REFUSALS="$tried/refused" PYTHONNOUSERSITE=1 MOETRAIN_BUILD_ISA=all \
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "${given[@]}" "$@")
}

# step WHAT COMMAND...
step() {
    local what="$1"
    shift
    say "trying the wheel: $what"
    in_try "$@" >"$tried/step.log" 2>&1 || {
        tail -n 40 "$tried/step.log" >&2
        fail "the wheel failed: $what (above)."
    }
    [[ ! -s "$tried/refused" ]] || fail "while $what, this was read from the clone: $(sort -u "$tried/refused" | head -n 3)."
    tail -n 1 "$tried/step.log"
}

check_surroundings() {
    local name
    for name in "${COMPILERS[@]}"; do
        if in_try bash -c "command -v $name" >/dev/null; then
            fail "the wheel must be tried without a compiler, and $name is on the path of the try."
        fi
    done
    # shellcheck disable=SC2016
    if in_try python -c 'import os; open(os.environ["REFUSED_FOLDER"] + "/README.md")' 2>/dev/null; then
        fail "the try must not be able to read the clone, and can."
    fi
    rm -f "$tried/refused"
    step "importing it" python -c '
import sys, torch, moetrain.ops
from moetrain import _C
for module in (torch, moetrain, _C):
    assert module.__file__.startswith(sys.prefix), f"{module} is not of the environment {sys.prefix}"
print(f"moetrain {moetrain.__version__} with torch {torch.__version__}, instruction sets {_C.built_isas()}")'
}

train_in_try() { # NAME
    step "training on two ranks, $1" python -m torch.distributed.run --standalone \
        --nproc-per-node 2 -m moetrain train --preset tiny --mesh.ep 2 --data.path corpus --run-dir "run-$1"
    in_try python -c '
import json, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
losses = [line["loss"] for line in steps if "loss" in line]
assert len(losses) == 20 and losses[-1] < losses[0] - 0.1, f"it did not learn: {losses}"
print(f"moetrain: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")' "run-$1/metrics.jsonl" ||
        fail "the wheel failed: training, $1 (above)."
}

# try_wheel WHEEL FOLDER: the folder is made, and left to the caller.
try_wheel() {
    local tried="$2" tool ignored=() given=() isa cores
    cores="$(getconf _NPROCESSORS_ONLN)"
    [[ "$(realpath -m "$tried")/" != "$MOETRAIN_ROOT"/* ]] ||
        fail "the wheel must be tried outside the clone, and temporary files go into $tried; set TMPDIR."
    mkdir -p "$tried/tools" "$tried/tmp"
    for tool in "${TOOLS[@]}"; do ln -s "$(type -P "$tool")" "$tried/tools/"; done
    for tool in "${UNTRIED[@]}"; do ignored+=(--ignore "$tool"); done
    if [[ -d /sys/class/net/lo ]]; then given=(GLOO_SOCKET_IFNAME=lo); fi
    say "installing the wheel into a new environment"
    install_wheel "$1"
    cp -r tests pyproject.toml "$tried/"
    forbid_clone
    check_surroundings
    # shellcheck disable=SC2016
    step "preparing text" bash -c 'moetrain prep --out corpus --validation 0.05 --source \
        "python=$(python -c "import asyncio; print(asyncio.__path__[0])"):*.py"'
    for isa in best portable; do
        if [[ "$isa" == portable ]]; then given+=(MOETRAIN_CPU_ISA=portable); fi
        train_in_try "$isa"
        step "running the operators' tests, $isa" python -m pytest -q -o pythonpath=tests -p no:cacheprovider \
            -m "not slow and not gpu" -n "$cores" --dist loadfile "${ignored[@]}" tests/ops
    done
    say "the wheel works: $(basename "$1")"
}
