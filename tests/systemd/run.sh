#!/bin/bash
# Boots a Debian with systemd as process 1 in namespaces of its own, runs a command in it as a service, and ends
# with that command's status. Needs root, and cgroup v2 somewhere; touches nothing of the host.
#
#   run.sh [options] -- COMMAND...     (a shell command line, in /payload)
#     -p PATH    file, or folder whose contents, to put into /payload; may be given several times
#     -o DIR     gets what the command left in /out, and the journal
#     -t SECS    limit for the whole run (default 600); past it: status 124
#
# Status: the command's; 124 on timeout; 125 when it left none; 77 where this machine cannot boot it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LARDER_SYSTEMD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-systemd}
payload=() out='' limit=600
while getopts p:o:t: option; do
    case $option in
    p) payload+=("$(realpath "$OPTARG")") ;; o) out=$OPTARG ;; t) limit=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
[ -x "$cache/root/lib/systemd/systemd" ] || { echo "run.sh: run setup.sh first" >&2; exit 2; }
cgroups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
if [ "$(id -u)" != 0 ] || [ -z "$cgroups" ] || [ ! -e /dev/fuse ]; then
    echo "run.sh: needs root, /dev/fuse and a mounted cgroup2" >&2
    exit 77
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/larder-systemd.XXXXXX")
group=$cgroups$(sed -n 's/^0:://p' /proc/self/cgroup | sed 's,/$,,')/larder-systemd.$$
mkdir -p "$work"/{upper,overlay,root,payload,out,state,tier} "$group"
cleanup() {
    # What is left of it ends with its process 1.
    [ ! -e "$group/cgroup.kill" ] || echo 1 >"$group/cgroup.kill" || true
    for _ in $(seq 50); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

for path in "${payload[@]}"; do
    if [ -d "$path" ]; then cp -a "$path/." "$work/payload/"; else cp -L "$path" "$work/payload/"; fi
done
printf '%s\n' "$*" >"$work/payload/command"
: >"$work/console"
cp "$here/guest/init" "$work/init"

status=0
# shellcheck disable=SC2016
(
    echo "$BASHPID" >"$group/cgroup.procs"
    exec timeout -k 5 "$limit" unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup \
        sh "$work/init" "$work" "$cache/root"
) </dev/null || status=$?
[ "$status" = 124 ] || [ "$status" = 137 ] || status=$(cat "$work/out/.rc" 2>/dev/null || echo 125)
cat "$work/out/.said" 2>/dev/null || true
if [ "$status" = 125 ]; then tail -n 40 "$work/console" >&2; fi
if [ -n "$out" ]; then
    mkdir -p "$out"
    cp -a "$work/out/." "$out/"
    cp "$work/console" "$out/console.log"
fi
exit "$status"
