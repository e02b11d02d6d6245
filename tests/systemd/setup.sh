#!/bin/bash
# Makes the small Debian that run.sh boots: debootstrap into the cache folder, about 280 MB and a minute.
# Nothing on the host changes but that folder. Once made it is taken as it is.
#
#   LARDER_SYSTEMD_CACHE   where it goes      (default: $XDG_CACHE_HOME/larder-systemd)
#   LARDER_SYSTEMD_SUITE   which Debian       (default: that of this machine)
set -euo pipefail
cache=${LARDER_SYSTEMD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-systemd}
suite=${LARDER_SYSTEMD_SUITE:-$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)}
[ ! -x "$cache/root/lib/systemd/systemd" ] || exit 0
if ! command -v debootstrap >/dev/null; then
    echo "setup.sh: needs debootstrap (apt install debootstrap)" >&2
    exit 77
fi
# From where this machine's own packages come.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' "Codename: $suite" 2>/dev/null | head -n1)
mkdir -p "$cache"
rm -rf --one-file-system "$cache/root.new"
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,fuse3,ca-certificates,procps \
    "$suite" "$cache/root.new" ${mirror:+"$mirror"} >"$cache/debootstrap.log" 2>&1 ||
    { tail -n 20 "$cache/debootstrap.log" >&2; exit 1; }
rm -rf "$cache/root.new/var/cache/apt/archives/"*.deb
mv "$cache/root.new" "$cache/root"
echo "Debian $suite with systemd, in $cache"
