#!/bin/bash
# Runs where systemd was booted (run.sh): the blocks of docs/operations.md, "A cluster: S3 and NFS", word for word, with
# nothing changed but the store's address, its keys, and a tier that is a directory. Needs larder, systemd/, operations.md.
set -euo pipefail
fail() { echo "FAILED: $*"; systemctl --no-pager status larder larder-keeper || true; exit 1; }
block() { # NUMBER of the block below "A cluster": without the fences and the indentation
    awk -v wanted="$1" '/^## /{on = /^## A cluster/; next} !on {next} /^ *```/{inside = !inside; if (inside) n++; next} inside && n == wanted {sub(/^   /, ""); print}' operations.md
}
here() { sed -e 's,https://s3.example.org,http://127.0.0.1:9000,' -e 's,AWS_PROFILE=larder,AWS_EC2_METADATA_DISABLED=true,' \
    -e 's,AWS_ACCESS_KEY_ID=\.\.\.,AWS_ACCESS_KEY_ID=k,' -e 's,AWS_SECRET_ACCESS_KEY=\.\.\.,AWS_SECRET_ACCESS_KEY=secretsecret,'; }
grep -q 'larder lake init' <(block 1) || fail "the first block of the page is another one"

install -m 755 larder /usr/local/bin/larder # whoever sets up a lake has it
systemd-run -q --unit=store --setenv=HOME=/root --setenv=LARDER_SERVE_ACCESS_KEY=k --setenv=LARDER_SERVE_SECRET_KEY=secretsecret \
    /usr/local/bin/larder lake serve /srv/store --listen 127.0.0.1:9000 --no-fsync
until bash -c 'exec 3<>/dev/tcp/127.0.0.1/9000' 2>/dev/null; do sleep 0.1; done
export AWS_ACCESS_KEY_ID=k AWS_SECRET_ACCESS_KEY=secretsecret
larder lake init --create-bucket --lake s3://datasets/other --endpoint http://127.0.0.1:9000 >/dev/null # a bucket
set -x
block 1 | here >one.sh
. ./one.sh
larder tier init /mnt/tier
block 2 | here >larder.toml
unset LARDER_LAKE LARDER_ENDPOINT
block 3 | here >three.sh
. ./three.sh
set +x
rm /usr/local/bin/larder
hash -r
getent group larder >/dev/null || fail "no group"
mkdir -p source /data/xray
echo alpha >source/a.txt
larder push -q source xray
larder tag xray v2 >/dev/null
block 4 >>/etc/fstab
systemctl daemon-reload
mount /data/xray
[ "$(cat /data/xray/a.txt)" = alpha ] || fail "other bytes"
useradd --create-home --groups larder ann
install -d -o ann /srv/ann
su ann -c 'larder mount xray@v2 /srv/ann && cat /srv/ann/a.txt' || fail "a member of the group cannot mount"
# Not every kernel can, and the state has to be on a disk that can.
mkdir -p /data/kernel
if uname -r | awk -F. '{ exit !($1 > 6 || $1 == 6 && $2 >= 12) }' && grep -q erofs /proc/filesystems; then
    larder cache -q xray@v2
    larder mount xray@v2 /data/kernel --engine kernel || fail "the kernel engine, as a service"
    [ "$(cat /data/kernel/a.txt)" = alpha ] || fail "other bytes by the kernel engine"
    larder umount /data/kernel
fi
useradd --create-home bob
! su bob -c 'larder mounts' >bob.log 2>&1 && grep -q 'may not use' bob.log || fail "somebody else reaches the daemon: $(cat bob.log)"
larder daemon metrics | grep -q '^larder_mounts{state="mounted"} 2' || fail "metrics"
systemctl restart larder
[ "$(cat /data/xray/a.txt)" = alpha ] || fail "other bytes after a restart"
echo "docs/operations.md holds"
