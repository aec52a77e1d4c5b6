#!/bin/sh
# Install Cropfeed with all extras into the virtual environment VENV: sh tools/install.sh VENV
# pip compiles FFCV, which has no wheel. This script installs what that needs with apt-get if it may. Otherwise it leaves FFCV out and
# creates the file VENV/without-ffcv, which `make test` reads. In CI (CI=true) a missing FFCV is an error.
set -eu
venv=$1
extras=train,gpu,ray,s3,report,export,bench,dev
needs="g++ pkg-config libopencv-dev libturbojpeg0-dev"

can_compile_ffcv() {
    command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg
}

if ! can_compile_ffcv && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -nE"; fi
    if $as_root true 2>/dev/null; then
        { $as_root apt-get update && $as_root apt-get install -y --no-install-recommends $needs; } || true  # checked below
    fi
fi

rm -f "$venv/without-ffcv"
if can_compile_ffcv; then
    extras=$extras,ffcv
else
    echo "FFCV and its tests are left out: compiling it needs: apt-get install $needs" >&2
    echo "then run: make clean, and make again" >&2
    if [ "${CI:-}" = true ]; then exit 1; fi
    touch "$venv/without-ffcv"
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
