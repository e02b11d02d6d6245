#!/bin/sh
# Installs moto's S3 server, the foreign store of the conformance tests, into a virtual environment
# below the cache directory, and prints the path of its program. Does nothing where it is there.
set -eu
dir="${LARDER_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-test}/moto"
if [ ! -e "$dir/complete" ]; then
    rm -rf "$dir"
    mkdir -p "$(dirname "$dir")"
    python3 -m venv "$dir" >&2
    "$dir/bin/pip" install --quiet --disable-pip-version-check 'moto[server]>=5,<6' >&2
    : >"$dir/complete"
fi
echo "$dir/bin/moto_server"
