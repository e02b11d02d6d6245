#!/bin/sh
# Runs in the guest: what of docs/semantics.md, "Kernels", holds on this kernel. One node, a tier on ext4.
#
#   KILLS=5  sh kernels.sh
#
# Ends with 1 at the first thing that is not as the table says; each "seen:" line is one thing that was.
set -u
KILLS=${KILLS:-5}
# After a kill -9 whoever waits has an answer within this, on a machine that is emulated: the bytes, or before
# Linux 6.9 an error.
BOUND=60
m=/m
say() { echo "$(cut -d' ' -f1 /proc/uptime) s: $*"; }
seen() { say "seen: $*"; }
fail() {
    say "FAILED: $*"
    cp /tmp/*.log /out/ 2>/dev/null
    cp /data/state/daemon.log /out/ 2>/dev/null
    tail -n 20 /data/state/daemon.log
    exit 1
}
release=$(uname -r)
major=${release%%.*}
minor=${release#*.}
minor=${minor%%[!0-9]*}
since() { [ "$major" -gt "$1" ] || { [ "$major" -eq "$1" ] && [ "$minor" -ge "$2" ]; }; }

# --- one commit: small files for the daemon, a large one for the kernel -------------------------------
mkdir -p /data $m /m2 /tmp/home
mount -t ext4 /dev/disk-data /data || fail "no disk"
mkdir -p /data/source
i=0
while [ $i -lt 200 ]; do
    d=/data/source/d$((i / 50))
    [ -d $d ] || mkdir $d
    head -c $((20000 + (i * 7919) % 100000)) /dev/urandom >$d/f$i
    i=$((i + 1))
done
head -c 69000000 /dev/urandom >/data/source/large
(cd /data/source && find . -type f | sort | xargs sha256sum) >/tmp/want
grep -v large /tmp/want | cut -c67- >/tmp/small
export HOME=/tmp/home LARDER_SERVE_ACCESS_KEY=k LARDER_SERVE_SECRET_KEY=secretsecret
./larder lake serve /data/lake --listen 127.0.0.1:9000 --no-fsync >/tmp/lake.log 2>&1 &
export AWS_ACCESS_KEY_ID=k AWS_SECRET_ACCESS_KEY=secretsecret AWS_EC2_METADATA_DISABLED=true
export LARDER_LAKE=s3://larder/p LARDER_ENDPOINT=http://127.0.0.1:9000
export LARDER_STATE=/data/state LARDER_TIER=/data/tier LARDER_SOCKET=/tmp/larder.sock
until grep -q serving /tmp/lake.log; do sleep 0.2; done
./larder push /data/source set >/tmp/push.log 2>&1 || fail "push: $(cat /tmp/push.log)"
./larder tier init /data/tier >/dev/null || fail "tier init"
./larder cache set >/dev/null 2>&1 || fail cache
./larder mount set $m >/dev/null || fail mount
./larder doctor | grep -E '(kernel|erofs) '
sums_of() { (cd "$1" && find . -type f | sort | xargs sha256sum) >/tmp/got && cmp /tmp/want /tmp/got >/dev/null; }
sums_of $m || fail "what was read is not what was pushed"
seen "mount, listing, and every byte"

daemon() { ./larder daemon status --json 2>/dev/null | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' | head -n1; }
metric() { ./larder daemon metrics 2>/dev/null | awk -v name="$1" 'index($1, name "{") == 1 { print int($2); exit }'; }

# --- passthrough -------------------------------------------------------------------------------------
exec 5<$m/large
if since 6 9; then
    i=0
    until [ "$(metric larder_mount_passthrough_files)" = 1 ]; do
        i=$((i + 1))
        [ $i -lt $BOUND ] || fail "the kernel does not get the large file"
        exec 5<&-
        sleep 1
        exec 5<$m/large
    done
    seen "passthrough: the kernel reads the large file itself"
else
    [ "$(metric larder_mount_passthrough_files)" = 0 ] || fail "passthrough on Linux $release"
    seen "no passthrough: the daemon serves the large file"
fi
head -c 1000000 /data/source/large | cmp - /dev/fd/6 6<$m/large 2>/dev/null | grep -v EOF && fail "the large file has other bytes"

# --- the kernel engine -------------------------------------------------------------------------------
if since 6 12; then
    ./larder mount set /m2 --engine kernel >/dev/null || fail "--engine kernel"
    grep -q ' /m2 erofs ' /proc/mounts || fail "/m2 is no EROFS: $(grep m2 /proc/mounts)"
    sums_of /m2 || fail "the kernel engine has other bytes"
    seen "kernel engine: EROFS, every byte"
else
    ./larder mount set /m2 --engine kernel >/tmp/engine.log 2>&1 && fail "--engine kernel on Linux $release"
    seen "no kernel engine: $(head -n1 /tmp/engine.log)"
    ./larder mount set /m2 --engine auto >/dev/null || fail "--engine auto does not fall back"
    sums_of /m2 || fail "--engine auto has other bytes"
    seen "--engine auto: the daemon serves"
fi

# --- readers: each round one file from the daemon, not from the page cache; R ok|error SECONDS per round --------
reader() {
    : >"/tmp/reader-$1.log"
    while [ ! -e /tmp/stop ]; do
        f=$(awk -v n=$((RANDOM % 200)) 'NR == n + 1' /tmp/small)
        begun=$(cut -d. -f1 /proc/uptime)
        if cmp -s "$m/$f" "/data/source/$f"; then how=ok; else how=error; fi
        echo "$how $(($(cut -d. -f1 /proc/uptime) - begun)) $f" >>"/tmp/reader-$1.log"
        [ "$how" = ok ] || sleep 0.2
    done
}
start_readers() {
    rm -f /tmp/stop
    readers=
    for r in 1 2 3; do
        reader $r &
        readers="$readers $!"
    done
    (while [ ! -e /tmp/stop ]; do echo 3 >/proc/sys/vm/drop_caches; sleep 0.3; done) &
    readers="$readers $!"
    sleep 2
}
# A reader that hangs is not waited for without end.
stop_readers() {
    touch /tmp/stop
    i=0
    for r in $readers; do
        while kill -0 "$r" 2>/dev/null; do
            i=$((i + 1))
            [ $i -lt $((BOUND * 5)) ] || fail "a reader hangs: $(ps | grep -E 'cmp' | head -n 3)"
            sleep 0.2
        done
    done
    errors=$(cat /tmp/reader-?.log | grep -c '^error')
    rounds=$(cat /tmp/reader-?.log | grep -c .)
    longest=$(cat /tmp/reader-?.log | awk '{ if ($2 > n) n = $2 } END { print n + 0 }')
    [ "$longest" -le $BOUND ] || fail "a reader waited $longest s"
}
wait_for_another() {
    i=0
    while now=$(daemon); [ -z "$now" ] || [ "$now" = "$1" ]; do
        i=$((i + 1))
        [ $i -lt $((BOUND * 5)) ] || fail "no other daemon comes"
        sleep 0.2
    done
}
held_reads_on() { dd bs=65536 skip=$((500 + $1)) count=1 <&5 2>/dev/null | cmp -s - /tmp/block; }

# --- an upgrade while files are read -----------------------------------------------------------------
cp larder /tmp/larder-other
before=$(daemon)
start_readers
if since 6 9; then
    ./larder daemon upgrade /tmp/larder-other >/tmp/upgrade.log 2>&1 || fail "upgrade: $(cat /tmp/upgrade.log)"
    wait_for_another "$before"
    sleep 2
    stop_readers
    [ "$errors" = 0 ] || fail "$errors errors of $rounds rounds in an upgrade"
    seen "upgrade under readers: $rounds rounds, no error, longest $longest s"
else
    ./larder daemon upgrade /tmp/larder-other >/tmp/upgrade.log 2>&1 && fail "an upgrade on Linux $release"
    [ "$(daemon)" = "$before" ] || fail "an upgrade that was refused has ended the daemon"
    stop_readers
    [ "$errors" = 0 ] || fail "$errors errors of $rounds rounds in an upgrade that was refused"
    seen "upgrade refused, nobody noticed ($rounds rounds): $(grep -m1 -o 'this kernel.*' /tmp/upgrade.log)"
fi

# --- kill -9 -----------------------------------------------------------------------------------------
start_readers
kill=0
while [ $kill -lt "$KILLS" ]; do
    kill=$((kill + 1))
    before=$(daemon)
    kill -9 "$before"
    wait_for_another "$before"
    sleep 1
done
stop_readers
if since 6 9; then
    [ "$errors" = 0 ] || fail "$errors errors of $rounds rounds in $KILLS kills"
    cmp -s /data/source/large - <&5 || fail "the file that was open reads other bytes, or an error"
    seen "$KILLS kills of the daemon under readers: $rounds rounds, no error, longest $longest s; the open file reads on"
else
    # It ends, with whatever the kernel says; bytes that come are right.
    (timeout $BOUND cat <&5 >/tmp/held) 2>/tmp/held.log
    how=$?
    [ $how != 124 ] && [ $how != 143 ] || fail "the file that was open hangs"
    cmp /data/source/large /tmp/held 2>&1 | grep -q differ && fail "the file that was open gives other bytes"
    seen "$KILLS kills of the daemon under readers: $errors errors of $rounds rounds, longest $longest s; the open file: $(tail -n1 /tmp/held.log)"
fi
exec 5<&-
i=0
until sums_of $m 2>/dev/null; do
    i=$((i + 1))
    [ $i -lt $BOUND ] || fail "the mount is not made again"
    sleep 1
done
seen "after that every byte is there again"
./larder umount $m >/dev/null || fail "umount"
./larder umount /m2 >/dev/null || fail "umount of /m2"
./larder daemon stop >/dev/null || fail "daemon stop"
grep -E 'larder' /proc/mounts && fail "a mount is left"
say "Linux $release: all as docs/semantics.md says"
