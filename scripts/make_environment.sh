#!/usr/bin/env bash
# Make a virtual environment and install a requirements file: with uv where there is one, with pip otherwise.
#
#     bash scripts/make_environment.sh .venv requirements-dev.txt
#
# PYTHON names the interpreter; without it the first of python3.11 to python3.13 and python3 that is 3.11 or later is taken.
# An environment that is already there is brought up to date.
set -euo pipefail
venv=$1 requirements=$2

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3.13 python3; do
    [ -z "$python" ] && is_new_enough "$candidate" && python=$candidate
done
if [ -z "$python" ] || ! is_new_enough "$python"; then
    echo "error: ${python:-no Python 3.11 or later found}: Weft needs Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2
    exit 1
fi

install_with_uv() {
    # uv does not read pip's configuration; without byte code every start of torch costs seconds
    "$1" pip install --python "$venv/bin/python" --compile-bytecode -r "$requirements" "${@:2}"
}

install_with_pip() {
    echo "uv is not usable here; installing with pip, which takes some minutes" >&2
    "$venv/bin/python" -m pip install --no-cache-dir --progress-bar off -r "$requirements"
}

make_venv() {
    if is_new_enough "$venv/bin/python"; then
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null # uv makes them without
        return
    fi
    if [ -n "$uv" ]; then
        "$uv" venv --quiet --seed --clear --python "$(command -v "$python")" "$venv"
    elif ! "$python" -m venv --clear "$venv"; then
        echo "error: $python cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv) or uv" >&2
        exit 1
    fi
}

uv=$(command -v uv || true)
make_venv
if [ -n "$uv" ]; then
    install_with_uv "$uv" || install_with_pip
elif "$venv/bin/python" -m pip install --quiet --no-cache-dir uv; then
    install_with_uv "$venv/bin/uv" --no-cache || install_with_pip
else
    install_with_pip
fi
