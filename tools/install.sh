#!/bin/sh
# Fill the virtual environment VENV: sh tools/install.sh VENV
# FFCV has no wheel, pip compiles it. What that needs comes from apt where we may install; else FFCV is left out, which the file
# VENV/without-ffcv records for `make test`. In CI (CI=true) that is an error.
set -eu
venv=$1
extras=dali,ffcv,ray,s3,export,dev
needs="g++ pkg-config libopencv-dev libturbojpeg0-dev"

can_compile_ffcv() {
    command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg
}

if ! can_compile_ffcv && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -nE"; fi
    if $as_root true 2>/dev/null; then
        { $as_root apt-get update && $as_root apt-get install -y --no-install-recommends $needs; } || true  # judged below
    fi
fi

rm -f "$venv/without-ffcv"
if ! can_compile_ffcv; then
    echo "FFCV is left out, and its tests: it is compiled, and that needs: apt-get install $needs" >&2
    echo "then: make clean, and make again" >&2
    if [ "${CI:-}" = true ]; then exit 1; fi
    extras=dali,ray,s3,export,dev
    touch "$venv/without-ffcv"
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
