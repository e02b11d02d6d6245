#!/bin/sh
# Runs in the guest: two nodes, two NFS clients, one tier, one lake. VERS and SQUASH choose the mount.
#
#   VERS=vers=4.2 SQUASH= sh e2e.sh
#
# Shows, and ends with 1 at the first thing that does not hold: both nodes read every file right, the
# lake sent each byte about once, a warm epoch costs few RPCs, a server that restarts hurts nobody.
set -u
. /nfs.sh
VERS=${VERS:-vers=4.2}
FILES=${FILES:-2000}
[ -n "${SQUASH:-}" ] && export_opts=rw,sync,no_subtree_check,root_squash,anonuid=1000,anongid=1000,fsid=0
fail() { echo "FAILED: $*"; exit 1; }
now() { cut -d' ' -f1 /proc/uptime; }

server_up 8
mkdir -p /srv/export/tier
[ -n "${SQUASH:-}" ] && chown 1000:1000 /srv/export /srv/export/tier
for n in 1 2; do
    c=$(echo ab | cut -c$n)
    client_up "$c" "$n"
    client_mount "$c" "$VERS" || fail "mount of $c"
done

# Files of up to 16 KiB, their bytes known by their digest.
mkdir -p /tmp/data
i=0
while [ $i -lt "$FILES" ]; do
    d=/tmp/data/d$((i / 100)); [ -d $d ] || mkdir -p $d
    head -c $((512 + (i * 7919) % 15800)) /dev/urandom >$d/f$i
    i=$((i + 1))
done
(cd /tmp/data && find . -type f | sort | xargs sha256sum >/tmp/want)

export LARDER_SERVE_ACCESS_KEY=k LARDER_SERVE_SECRET_KEY=secretsecret
./larder lake serve /tmp/lake --listen 127.0.0.1:9000 --no-fsync >/tmp/lake.log 2>&1 &
sleep 2
export AWS_ACCESS_KEY_ID=k AWS_SECRET_ACCESS_KEY=secretsecret AWS_EC2_METADATA_DISABLED=true
export LARDER_LAKE=s3://larder/p LARDER_ENDPOINT=http://127.0.0.1:9000
node() { # NAME COMMAND...
    n=$1; shift
    HOME=/tmp/home-$n LARDER_STATE=/tmp/state-$n LARDER_TIER=/mnt/$n/tier LARDER_SOCKET=/tmp/$n.sock ./larder "$@"
}
node a push /tmp/data set || fail push
node a tier init /mnt/a/tier || fail "tier init"
for n in a b; do
    mkdir -p /tmp/home-$n /tmp/m-$n
    node $n mount set /tmp/m-$n --prefetch all || fail "mount $n"
done
sums() { (cd /tmp/m-"$1" && cut -c67- /tmp/want | xargs -n 50 -P 4 sha256sum | sort -k2 >/tmp/got-"$1"); }
t0=$(now)
sums a & p=$!
sums b
wait $p
echo "cold epoch, two nodes: $t0 to $(now)"
sort -k2 /tmp/want >/tmp/want.s
for n in a b; do cmp /tmp/want.s /tmp/got-$n || fail "node $n read wrong bytes"; done
for n in a b; do node $n status --json >/out/status-$n.json; done
node a tier check || fail "tier check"

# RPCs of a mount, summed: all, and by name.
rpcs() { # MOUNTPOINT
    awk -v at="$1" '$1 == "device" { on = ($5 == at) } on && ops && $1 ~ /^[A-Z_]+:$/ { sub(":", "", $1); n[$1] += $2; all += $2 }
        on && /per-op statistics/ { ops = 1 } $1 == "device" { ops = 0 }
        END { printf "all %d", all; for (k in n) if (n[k]) printf " %s %d", k, n[k]; print "" }' /proc/self/mountstats
}
cat /proc/self/mountstats >/out/mountstats
sleep 3
for round in 1 2 3; do
    echo 3 >/proc/sys/vm/drop_caches
    rpcs /mnt/a >/tmp/before
    if [ $round = 3 ]; then sort -R /tmp/want | cut -c67- >/tmp/order; else cut -c67- /tmp/want >/tmp/order; fi
    t0=$(now)
    (cd /tmp/m-a && xargs cat </tmp/order >/dev/null)
    rpcs /mnt/a >/tmp/after
    echo "warm epoch $round: $t0 to $(now); before: $(cat /tmp/before); after: $(cat /tmp/after)"
done
mkdir -p /out; cp /tmp/*.log /out/ 2>/dev/null
cp /tmp/state-a/*.log /out/ 2>/dev/null
echo PASSED
