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
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        nc_python_fits "$PYTHON" || nc_fail "PYTHON=$PYTHON is not Python 3.11 or newer, which constraints.txt needs, or does not run"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python3.14 python; do
        if nc_python_fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    nc_fail "Python 3.11 or newer is needed and none was found; install it, or say where it is with PYTHON=/path/to/python"
}

# Prints a hash of what extra $1 is installed from.
nc_stamp() {
    "$NC_VENV/bin/python" - "$1" "$NC_ROOT/pyproject.toml" "$NC_ROOT/constraints.txt" "$NC_ROOT/scripts/setup_env.sh" <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(repr((sys.version, sys.argv[1])).encode())
for name in sys.argv[2:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

nc_check_disk() {
    local needed="${NC_PATCH_MIN_DISK_MB:-4000}" free
    free="$(df -Pm "$NC_ROOT" | awk 'NR == 2 { print $4 }')"
    if [ -n "$free" ] && [ "$free" -lt "$needed" ]; then
        nc_fail "$NC_ROOT has $free MB free and the installation needs $needed MB; make room first"
    fi
}

# Runs pip; on failure says what most likely went wrong, in one line after pip's own.
nc_pip() {
    local log
    log="$(mktemp)"
    if "$NC_VENV/bin/python" -m pip --disable-pip-version-check "$@" >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    tail -n 25 "$log" >&2
    local why="see the lines above"
    if grep -qiE 'No space left|Errno 28' "$log"; then
        why="the disk is full"
    elif grep -qiE 'name resolution|name or service|NewConnectionError|ConnectTimeout|Network is unreachable|Connection refused|ProxyError|SSLError|No matching distribution|ResolutionImpossible' "$log"; then
        why="the package index could not be reached or lacks a package; check the network and the settings of pip"
    fi
    rm -f "$log"
    nc_fail "installation failed: $why. Run the script again to go on."
}

# setup_env EXTRA [PACKAGE...]: packages are installed without their dependencies, at the pinned versions.
setup_env() {
    local extra="$1" python stamp
    shift
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
    stamp="$(nc_stamp "$extra $*")"
    if [ "$(cat "$NC_VENV/.nc_patch-$extra" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    nc_check_disk
    echo "Installing nc_patch[$extra] into $NC_VENV; a few minutes the first time."
    # PyTorch first and alone, so that no other package's requirement chooses its version.
    nc_pip install -c "$NC_ROOT/constraints.txt" torch
    nc_pip install -c "$NC_ROOT/constraints.txt" -e "$NC_ROOT[$extra]"
    if [ $# -gt 0 ]; then
        nc_pip install --no-deps -c "$NC_ROOT/constraints.txt" "$@"
    fi
    printf '%s\n' "$stamp" >"$NC_VENV/.nc_patch-$extra"
}
