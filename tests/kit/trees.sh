#!/usr/bin/env bash
# Trees nobody here wrote, for the campaign: prints the directory that holds `linux` (Debian's kernel
# source) and `site-packages` (scikit-learn, Pillow and what they need). Fetched once, kept in the cache.
set -euo pipefail
cache=${LARDER_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-tests}
mkdir -p "$cache/debs"

if [ ! -e "$cache/linux/.done" ]; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq >&2
    # The metapackage names the version that Debian has now.
    package=$(apt-cache depends linux-source | sed -n 's/^ *Depends: \(linux-source-[0-9.]*\)$/\1/p' | head -n 1)
    (cd "$cache/debs" && apt-get download -qq "$package" >&2)
    rm -rf "$cache/linux" "$cache/unpacked"
    dpkg-deb -x "$cache"/debs/"$package"_*.deb "$cache/unpacked"
    mkdir -p "$cache/linux"
    tar -C "$cache/linux" --strip-components 1 -xJf "$cache"/unpacked/usr/src/linux-source-*.tar.xz
    rm -rf "$cache/unpacked"
    touch "$cache/linux/.done"
fi
if [ ! -e "$cache/python/.done" ]; then
    rm -rf "$cache/python"
    python3 -m venv "$cache/python" >&2
    "$cache/python/bin/pip" install -q --disable-pip-version-check scikit-learn Pillow >&2
    ln -sfn "$(echo "$cache"/python/lib/python3*/site-packages)" "$cache/site-packages"
    touch "$cache/python/.done"
fi
echo "$cache"
