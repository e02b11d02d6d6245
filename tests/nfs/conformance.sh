#!/bin/sh
# Runs in the guest: the tier's conformance battery, each behaviour seen by two NFS clients of one
# export, for each kind of mount that counts. Needs `larder` and `libtest` (the library's tests) beside it.
set -u
. /nfs.sh
fail() { echo "FAILED: $*"; exit 1; }
server_up 8
client_up a 1
client_up b 2
./larder tier init /tmp/tier >/dev/null || fail "tier init"
for kind in ${KINDS:-vers=4.2,no_root_squash vers=3,no_root_squash vers=4.2,root_squash vers=3,root_squash}; do
    version=${kind%,*} squash=${kind#*,}
    rm -rf /srv/export/*
    for n in 1 2 3 4 5 6 7 8 9 10 11 12 13; do cp -a /tmp/tier /srv/export/tier-$n; done
    [ $squash = root_squash ] && chown -R 1000:1000 /srv/export
    echo "/srv/export *(rw,sync,no_subtree_check,$squash,anonuid=1000,anongid=1000,fsid=0)" >/etc/exports
    exportfs -ra
    for c in a b; do client_mount $c "$version" || fail "mount of $c, $kind"; done
    LARDER_TEST_TIER_MOUNTS=/mnt/a:/mnt/b ./libtest --nocapture the_tier_conforms_through_two_nfs_clients >/tmp/out 2>&1 ||
        { cat /tmp/out; fail "$kind"; }
    grep -q "test result: ok. 1 passed" /tmp/out || { cat /tmp/out; fail "$kind: the test did not run"; }
    echo "ok: $kind, $(cut -d' ' -f1 /proc/uptime) s"
    for c in a b; do client_umount $c; done
done
echo PASSED
