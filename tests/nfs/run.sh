#!/bin/bash
# Boots the guest, runs a command in it, and ends with that command's status.
#
#   run.sh [options] -- COMMAND...     (a shell command line for the guest)
#     -p PATH    file, or folder whose contents, to put into /payload
#                (the command's working directory); may be given several times
#     -o DIR     gets what the command left in /out, and console.log
#     -t SECS    limit for the whole run (default 300); past it: status 124
#     -m MIB     memory (default 1536)        -c N  vCPUs (default 1)
#     -d MIB     size of the ext4 data disk that the server exports
#                (default 2048, sparse)
#     -k WORDS   more kernel command line     -q ARGS  more qemu arguments
#
# Status: the command's; 124 on timeout; 125 when the guest left none (panic).
set -euo pipefail
cache=${LARDER_NFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-nfs${LARDER_NFS_KERNEL:+-$LARDER_NFS_KERNEL}}
root=$cache/root
payload=() out= limit=300 mem=1536 cpus=1 disk=2048 kargs= qargs=
while getopts p:o:t:m:c:d:k:q: opt; do
    case $opt in
    p) payload+=("$OPTARG") ;; o) out=$OPTARG ;; t) limit=$OPTARG ;;
    m) mem=$OPTARG ;; c) cpus=$OPTARG ;; d) disk=$OPTARG ;;
    k) kargs=$OPTARG ;; q) qargs=$OPTARG ;; *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
[ -e "$cache/base.cpio" ] || { echo "run.sh: run setup.sh first" >&2; exit 2; }

# The disks lie in memory where they can (they take what is written to them), so
# that a busy host disk does not slow the guest.
tmp=${LARDER_NFS_TMP:-/dev/shm}
[ -w "$tmp" ] || tmp=${TMPDIR:-/tmp}
work=$(mktemp -d "$tmp/larder-nfs.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The payload is a second cpio archive after the base one: the kernel unpacks
# both, one over the other.
mkdir -p "$work/in/payload"
for p in "${payload[@]}"; do
    if [ -d "$p" ]; then cp -a "$p/." "$work/in/payload/"; else cp -L "$p" "$work/in/payload/"; fi
done
printf '%s\n' "$*" >"$work/in/payload-cmd"
{ cat "$cache/base.cpio"
  (cd "$work/in" && find . | "$root/bin/busybox" cpio -o -H newc -R 0:0 2>/dev/null); } >"$work/initrd"
rm -rf "$work/in"

truncate -s "${disk}M" "$work/data.raw"
/sbin/mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 "$work/data.raw"
truncate -s 256M "$work/out.raw"

export LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
status=0
# The clock is the HPET: the guest measures the speed of the time-stamp counter
# at boot, and on a busy host once got it wrong by a factor of 2.7.
# shellcheck disable=SC2086
timeout -k 5 "$limit" "$root/usr/bin/qemu-system-x86_64" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" \
    -M "${LARDER_NFS_MACHINE:-q35}" -accel "${LARDER_NFS_ACCEL:-tcg,thread=multi}" -cpu "${LARDER_NFS_CPU:-max,la57=off}" \
    -smp "$cpus" -m "$mem" -nodefaults -no-user-config -no-reboot -display none -monitor none \
    -kernel "${LARDER_NFS_VMLINUZ:-$cache/vmlinuz}" -initrd "$work/initrd" \
    -append "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t nokaslr mitigations=off clocksource=hpet tsc=unstable random.trust_cpu=on $kargs" \
    -serial "file:$work/console.log" -chardev stdio,id=user,signal=off -serial chardev:user \
    -drive "if=none,id=data,file=$work/data.raw,format=raw,cache=unsafe" \
    -device virtio-blk-pci,drive=data,serial=data \
    -drive "if=none,id=out,file=$work/out.raw,format=raw,cache=unsafe" \
    -device virtio-blk-pci,drive=out,serial=out \
    $qargs </dev/null || status=$?
mkdir -p "$work/out"
tar xf "$work/out.raw" -C "$work/out" 2>/dev/null || true
if [ "$status" = 0 ]; then status=$(cat "$work/out/.rc" 2>/dev/null || echo 125); fi
if [ -n "$out" ]; then
    mkdir -p "$out"
    cp -a "$work/out/." "$out/"
    cp "$work/console.log" "$out/console.log"
fi
if [ "$status" = 125 ]; then tail -n 40 "$work/console.log" >&2; fi
exit "$status"
