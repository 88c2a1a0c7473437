# Sourced by every finding: a temporary folder, pinned packages in it, the verdict.
# shellcheck shell=bash
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python="$folder/venv/bin/python"
if [[ -n "${FINDINGS_VENV:-}" ]]; then python="$FINDINGS_VENV/bin/python"; fi  # one that has the packages already
if [[ -d /sys/class/net/lo ]]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"; fi
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
unset PYTHONPATH

# install NAME==VERSION...: into the temporary folder; of torch, the CPU build where the index has one.
install() {
    local package there pip=("$python" -m pip install --quiet --disable-pip-version-check)
    if [[ -n "${FINDINGS_VENV:-}" ]]; then
        there="$("$python" -m pip freeze 2>/dev/null)"
        for package in "$@"; do
            [[ "$there" == *"$package"* ]] || fail "FINDINGS_VENV has no $package"
        done
        return
    fi
    "${MOETRAIN_PYTHON:-python3}" -m venv "$folder/venv" || fail "could not make a virtual environment"
    if [[ -n "${MOETRAIN_TORCH_INDEX:-}" ]]; then export PIP_EXTRA_INDEX_URL="$MOETRAIN_TORCH_INDEX"; fi
    for package in "$@"; do
        case "$package" in
            torch==*) "${pip[@]}" "$package+cpu" numpy 2>"$folder/pip.log" || "${pip[@]}" "$package" numpy ;;
            *) "${pip[@]}" "$package" 2>"$folder/pip.log" ;;
        esac || fail "could not install $package: $(tail -n 1 "$folder/pip.log")"
    done
}

fail() {
    echo "finding: $1" >&2
    exit 2
}

# verdict COMMAND...: it exits with 0 where the behaviour is as described.
verdict() {
    if "$@"; then
        echo "finding: as described"
    else
        echo "finding: the behaviour has changed; see the top of $0 for what leans on it" >&2
        exit 1
    fi
}
