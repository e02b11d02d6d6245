#!/bin/sh
# Runs in the guest: two nodes (daemons with their own state), two NFS clients, one tier, one lake.
#
#   VERS=vers=4.2|vers=3  SQUASH=no_root_squash|root_squash  FILES=2000  sh nodes.sh
#
# Ends with 1 at the first thing that does not hold: both nodes read every file right, cold, warm,
# while the server restarts and while one of them is killed; a warm epoch costs few calls to the server.
set -u
. /nfs.sh
VERS=${VERS:-vers=4.2}
SQUASH=${SQUASH:-no_root_squash}
FILES=${FILES:-2000}
export_opts=rw,sync,no_subtree_check,$SQUASH,anonuid=1000,anongid=1000,fsid=0
fail() {
    echo "FAILED: $*"
    cp /tmp/*.log /out/ 2>/dev/null
    for n in a b; do cp /tmp/state-$n/daemon.log /out/daemon-$n.log 2>/dev/null; done
    exit 1
}
say() { echo "$(cut -d' ' -f1 /proc/uptime) s: $*"; }

server_up 8
[ "$SQUASH" = root_squash ] && chown 1000:1000 /srv/export
client_up a 1
client_up b 2
for c in a b; do client_mount $c "$VERS" || fail "mount of $c"; done

# Files of 512 bytes to 16 KiB in folders of 100.
mkdir -p /tmp/data
i=0
while [ $i -lt "$FILES" ]; do
    d=/tmp/data/d$((i / 100))
    [ -d $d ] || mkdir $d
    head -c $((512 + (i * 7919) % 15872)) /dev/urandom >$d/f$i
    i=$((i + 1))
done
(cd /tmp/data && find . -type f | sort | xargs sha256sum) >/tmp/want
cut -c67- /tmp/want >/tmp/in-order
awk 'BEGIN { srand(7) } { print rand() "\t" $0 }' /tmp/in-order | sort -n | cut -f2 >/tmp/shuffled
sort -k2 /tmp/want >/tmp/want.sorted

export LARDER_SERVE_ACCESS_KEY=k LARDER_SERVE_SECRET_KEY=secretsecret
./larder lake serve /tmp/lake --listen 127.0.0.1:9000 --no-fsync >/tmp/lake.log 2>&1 &
sleep 2
export AWS_ACCESS_KEY_ID=k AWS_SECRET_ACCESS_KEY=secretsecret AWS_EC2_METADATA_DISABLED=true
export LARDER_LAKE=s3://larder/p LARDER_ENDPOINT=http://127.0.0.1:9000 LARDER_STEWARD_PERIOD=1h
node() { # NAME ARGUMENTS...
    n=$1
    shift
    HOME=/tmp/home-$n LARDER_STATE=/tmp/state-$n LARDER_TIER=/mnt/$n/tier LARDER_SOCKET=/tmp/$n.sock ./larder "$@"
}
sums() { (cd "/tmp/m-$1" && xargs -n 50 -P 4 sha256sum </tmp/shuffled) | sort -k2 >"/tmp/got-$1"; }
right() { cmp /tmp/want.sorted "/tmp/got-$1" >/dev/null || fail "$2: node $1 read wrong bytes, or not all"; }

node a push /tmp/data set 2>/dev/null || fail push
node a tier init /mnt/a/tier >/dev/null || fail "tier init"
for n in a b; do
    mkdir -p /tmp/home-$n /tmp/m-$n
    node $n mount set /tmp/m-$n --prefetch all 2>/dev/null || fail "mount on node $n"
done

say "cold, both nodes at once"
sums a &
p=$!
sums b
wait $p
for n in a b; do right $n cold; done
node a tier check >/dev/null || fail "tier check after the cold epoch"

# Calls of one mount to the server, by name.
calls() { # MOUNTPOINT FILE
    awk -v at="$1" '$1 == "device" { on = ($5 == at); ops = 0 } on && ops && $1 ~ /^[A-Z_]+:$/ { sub(":", "", $1); print $1, $2 }
        on && /per-op statistics/ { ops = 1 }' /proc/self/mountstats | sort >"$2"
}
spent() { # NAMES (a regular expression): how many calls between the two counts
    awk -v names="^($1)\$" 'FNR == NR { had[$1] = $2; next } $1 ~ names { n += $2 - had[$1] } END { print n + 0 }' /tmp/before /tmp/after
}
epoch() { # ORDER: one warm epoch on node a, nothing in the page cache
    echo 3 >/proc/sys/vm/drop_caches
    calls /mnt/a /tmp/before
    (cd /tmp/m-a && xargs cat <"$1") | wc -c >/tmp/bytes
    calls /mnt/a /tmp/after
}
undisturbed() { # ORDER: an epoch in which the node did not happen to look through the tier (the accounting, once a minute)
    for try in 1 2 3 4 5; do
        epoch "$1"
        [ "$(spent 'READDIR|READDIRPLUS')" -eq 0 ] && return
    done
    fail "five epochs, and the node looked through the tier in each"
}
sleep 5 # what the cold epoch left to do
undisturbed /tmp/in-order
all=$(spent '.*')
say "warm, in order: $all calls for $FILES files ($(spent READ) READ)"
[ $((all * 5)) -le "$FILES" ] || fail "more than 0.2 calls a file in order: $(tr '\n' ' ' </tmp/before) then $(tr '\n' ' ' </tmp/after)"
undisturbed /tmp/shuffled
say "warm, shuffled: $(spent READ) READ, $(spent 'OPEN|GETATTR|ACCESS|LOOKUP') OPEN, GETATTR, ACCESS and LOOKUP for $FILES files"
[ "$(spent 'OPEN|GETATTR|ACCESS')" -le 2 ] || fail "a shuffled epoch opens or looks: $(tr '\n' ' ' </tmp/before) then $(tr '\n' ' ' </tmp/after)"
[ $(($(spent READ) * 10)) -le $((FILES * 11)) ] || fail "more than 1.1 READ a file"

say "the server restarts under both"
echo 3 >/proc/sys/vm/drop_caches
sums a &
p=$!
sleep 1
server_restart 8
sums b
wait $p
for n in a b; do right $n "server restart"; done

say "the server is away from node a, a hard mount"
echo 3 >/proc/sys/vm/drop_caches
# Each file is asked of the lake by itself now, so a few are enough.
head -n 200 /tmp/shuffled >/tmp/some
(cd /tmp/data && xargs sha256sum </tmp/some | sort -k2) >/tmp/want.some
some() { # NODE WHAT
    (cd "/tmp/m-$1" && xargs -n 25 -P 4 sha256sum </tmp/some) | sort -k2 >"/tmp/got.some-$1"
    cmp /tmp/want.some "/tmp/got.some-$1" >/dev/null || fail "$2: node $1 read wrong bytes, or not all"
}
client_link a down
begun=$(cut -d. -f1 /proc/uptime)
some a "the tier hangs" &
p=$!
sleep 20 # within it somebody has met the silence
timeout 60 sh -c 'HOME=/tmp/home-a LARDER_STATE=/tmp/state-a LARDER_TIER=/mnt/a/tier LARDER_SOCKET=/tmp/a.sock ./larder mounts --json' >/tmp/mounts-a ||
    fail "the daemon does not answer while its tier hangs"
wait $p || exit 1
say "read from the lake in $(($(cut -d. -f1 /proc/uptime) - begun)) s"
some b "beside a node whose tier hangs"
client_link a up
tier_bytes() { node a daemon metrics | awk '/^larder_fetch_read_bytes_total.*source="tier"/ { n += $2 } END { printf "%d", n }'; }
before=$(tier_bytes) back=
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    echo 3 >/proc/sys/vm/drop_caches
    # All of them: what the lake gave in the meantime is in the daemon's memory.
    sums a
    right a "the server is back"
    [ "$(tier_bytes)" -gt $((before + 1000000)) ] && back=yes && break
    sleep 5
done
[ -n "$back" ] || fail "the tier is not used again after its server came back"
say "the tier is used again"

say "node b is killed in a cold epoch"
for n in a b; do node $n umount /tmp/m-$n || fail "umount on node $n"; done
node a uncache set >/dev/null 2>&1 || say "uncache refused (a lease is left)"
for n in a b; do node $n mount set /tmp/m-$n --prefetch all 2>/dev/null || fail "second mount on node $n"; done
sums a &
p=$!
sleep 1
kill -9 "$(node b status --json --no-lake | tr ',{' '\n\n' | sed -n 's/.*"pid": *//p' | head -n1)"
wait $p
right a "killed peer"
node b daemon >/dev/null 2>&1
sleep 2
sums b
right b "after the restart"
node a tier check >/dev/null || fail "tier check at the end"
say PASSED
