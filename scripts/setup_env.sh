# Sourced by the other scripts: setup_env EXTRA makes .venv in the checkout and installs nc_patch with that extra.
# A stamp in .venv holds a hash of what was installed from, so that a second call returns at once.
# PYTHON=/path/to/python chooses the interpreter; NC_PATCH_MIN_DISK_MB the free space that is asked for.
# shellcheck shell=bash

NC_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NC_VENV="$NC_ROOT/.venv"

nc_fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Whether $1 runs and is Python 3.11 or newer: the library runs with 3.10, but the pinned versions do not.
nc_python_fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the first interpreter that fits, beginning with those the pinned versions are tested with.
nc_find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python3.14 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        nc_python_fits "$candidate" && printf '%s\n' "$candidate" && return
    done
    [ -z "${PYTHON:-}" ] || nc_fail "PYTHON=$PYTHON is not Python 3.11 or newer, which constraints.txt needs, or does not run"
    nc_fail "Python 3.11 or newer is needed and none was found; install it, or say where it is with PYTHON=/path/to/python"
}

nc_check_disk() {
    local needed="${NC_PATCH_MIN_DISK_MB:-4000}" free
    free="$(df -Pm "$NC_ROOT" | awk 'NR == 2 { print $4 }')"
    [ "${free:-$needed}" -ge "$needed" ] ||
        nc_fail "$NC_ROOT has $free MB free and the installation needs $needed MB; make room first"
}

# Runs pip; on failure says what most likely went wrong, in one line after pip's own.
nc_pip() {
    local said why="see the lines above"
    said="$("$NC_VENV/bin/python" -m pip --disable-pip-version-check "$@" 2>&1)" && return
    tail -n 25 <<<"$said" >&2
    if grep -qiE 'No space left|Errno 28' <<<"$said"; then
        why="the disk is full"
    elif grep -qiE 'name resolution|name or service|NewConnectionError|ConnectTimeout|Network is unreachable|Connection refused|ProxyError|SSLError|No matching distribution|ResolutionImpossible' <<<"$said"; then
        why="the package index could not be reached or lacks a package; check the network and the settings of pip"
    fi
    nc_fail "installation failed: $why. Run the script again to go on."
}

# setup_env EXTRA [PACKAGE...]: packages are installed without their dependencies, at the pinned versions.
setup_env() {
    local extra="$1" python stamp
    [ -f "$NC_ROOT/constraints.txt" ] || nc_fail "$NC_ROOT/constraints.txt is missing; this is not a whole checkout"
    if ! nc_python_fits "$NC_VENV/bin/python"; then
        python="$(nc_find_python)" || exit 1
        "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
            nc_fail "$python cannot make virtual environments; install its venv module (on Debian and Ubuntu: apt install python3-venv)"
        nc_check_disk
        echo "Making $NC_VENV with $("$python" --version)."
        rm -rf "$NC_VENV"
        "$python" -m venv "$NC_VENV" || nc_fail "$NC_VENV could not be made"
    fi
    stamp="$({ "$NC_VENV/bin/python" -VV && echo "$@" && cd "$NC_ROOT" && cat pyproject.toml constraints.txt scripts/setup_env.sh; } | cksum)"
    [ "$(cat "$NC_VENV/.nc_patch-$extra" 2>/dev/null)" != "$stamp" ] || return 0
    nc_check_disk
    echo "Installing nc_patch[$extra] into $NC_VENV; a few minutes the first time."
    # PyTorch first and alone, so that no other package's requirement chooses its version.
    nc_pip install -c "$NC_ROOT/constraints.txt" torch
    nc_pip install -c "$NC_ROOT/constraints.txt" -e "$NC_ROOT[$extra]"
    [ $# -eq 1 ] || nc_pip install --no-deps -c "$NC_ROOT/constraints.txt" "${@:2}"
    printf '%s\n' "$stamp" >"$NC_VENV/.nc_patch-$extra"
}
