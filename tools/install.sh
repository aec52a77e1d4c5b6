#!/bin/sh
# Install Cropfeed with some extras into a virtual environment: sh tools/install.sh VENV EXTRA,EXTRA
# pip compiles FFCV, which has no wheel. With the extra ffcv, this script installs what that needs with apt-get if it may. Otherwise
# it leaves FFCV out and creates the file VENV/without-ffcv, which `make test` reads. In CI (CI=true) a missing FFCV is an error.
set -eu
venv=$1
extras=$2
needs="g++ pkg-config libopencv-dev libturbojpeg0-dev"

can_compile_ffcv() {
    command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg
}

case ",$extras," in *,ffcv,*)
    if ! can_compile_ffcv && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -nE"; fi
        if $as_root true 2>/dev/null; then
            # jpegtran, of libjpeg-turbo-progs, writes JPEGs for some tests.
            { $as_root apt-get update && $as_root apt-get install -y --no-install-recommends $needs libjpeg-turbo-progs; } || true  # checked below
        fi
    fi
    rm -f "$venv/without-ffcv"
    if ! can_compile_ffcv; then
        echo "FFCV and its tests are left out, because FFCV cannot be compiled without: apt-get install $needs" >&2
        echo "To include FFCV, install these packages, run make clean, then run make again." >&2
        if [ "${CI:-}" = true ]; then exit 1; fi
        touch "$venv/without-ffcv"
        extras=$(echo ",$extras," | sed 's/,ffcv,/,/; s/^,//; s/,$//')
    fi
esac

echo "Installing PyTorch, then the packages of the extras $extras, into $venv" >&2
install="$venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt"
$install torch
$install --editable ".[$extras]"
case ",$extras," in *,dev,*)
    # For tests, in folders of their own: torchvision has no build for every torch, see tests/with_timm.py, and torch for CPUs
    # brings no Triton, see tests/with_triton.py. This version, of 190 MB, belongs to the oldest torch that we support.
    $install --upgrade --no-deps --target "$venv/timm" timm torchvision
    if ! "$venv/bin/python" -c "import triton" 2>/dev/null && [ ! -e "$venv/triton/triton-3.6.0.dist-info" ]; then
        $install --upgrade --no-deps --target "$venv/triton" triton==3.6.0
    fi
esac
