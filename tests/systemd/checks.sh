#!/bin/bash
# Runs where systemd was booted (run.sh): docs/operations.md from the package on, as a new operator goes through it,
# then what may happen to a node in service, while files are read.
#
#   KILLS=3  checks.sh         needs larder.deb, and newer.deb: the same under a higher version
#
# Ends with 1 at the first thing that does not hold.
set -uo pipefail
KILLS=${KILLS:-3}
# Nothing here is about speed: the machine may be busy.
BOUND=120
dir=/data/xray
say() { echo "$SECONDS s: $*"; }
fail() {
    say "FAILED: $*"
    {
        larder mounts
        systemctl --no-pager status larder larder-keeper
        grep fuse.larder /proc/mounts
        cat /out/reader-*.log
    } 2>&1 | tail -n 80
    exit 1
}
until_true() { # WHAT COMMAND...
    local what=$1 end=$((SECONDS + BOUND))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what: not within $BOUND s"
        sleep 0.1
    done
}
pid_of() { systemctl show -P MainPID "$1"; }
is_another() { # UNIT PID: it runs, and is another process
    [ "$(systemctl is-active "$1")" = active ] && [ "$(pid_of "$1")" != "$2" ]
}
serves() { larder mounts --json | grep -q '"state": "mounted"' && grep -q " $dir fuse.larder " /proc/mounts; }

# --- from nothing ------------------------------------------------------------------------------------
dpkg -i larder.deb >/out/dpkg.log 2>&1 || fail "dpkg -i: $(cat /out/dpkg.log)"
getent group larder >/dev/null || fail "the package makes no group"
[ "$(systemctl is-active larder)" = inactive ] || fail "the package starts a service that has no configuration"

cp /usr/bin/larder /payload/store # the store is no part of the node
systemd-run -q --unit=store --setenv=HOME=/root --setenv=LARDER_SERVE_ACCESS_KEY=k --setenv=LARDER_SERVE_SECRET_KEY=secretsecret \
    /payload/store lake serve /srv/store --listen 127.0.0.1:9000 --no-fsync
cat >/etc/larder/larder.toml <<'END'
state = "/var/lib/larder"

[lake]
url = "s3://datasets/larder"
endpoint = "http://127.0.0.1:9000"

[tier.nfs]
path = "/mnt/tier"
capacity = "4GiB"

[mount]
allow_other = true

[daemon]
socket = "/run/larder/daemon.sock"
group = "larder"
on_demand = false
restart = false
END
install -m 600 /dev/stdin /etc/larder/credentials <<'END'
AWS_ACCESS_KEY_ID=k
AWS_SECRET_ACCESS_KEY=secretsecret
AWS_EC2_METADATA_DISABLED=true
END
set -a
. /etc/larder/credentials
set +a
until_true "the store" bash -c 'exec 3<>/dev/tcp/127.0.0.1/9000'
larder lake init --create-bucket >/dev/null || fail "lake init"
larder tier init /mnt/tier >/dev/null || fail "tier init"
systemctl enable -q --now larder-keeper larder || fail "the units do not start"
larder doctor || fail "larder doctor"

mkdir -p /srv/source "$dir"
for number in $(seq 20); do head -c 300000 /dev/urandom >"/srv/source/f$number"; done
head -c 70000000 /dev/urandom >/srv/source/large
larder push -q /srv/source xray || fail push
larder tag xray v2 >/dev/null || fail tag
larder cache -q xray@v2 || fail cache
grep -o '^ *xray@v2 .*' operations.md | sed 's/^ *//' >>/etc/fstab
grep -q " $dir  larder " /etc/fstab || fail "docs/operations.md has no line for fstab"
systemctl daemon-reload
mount "$dir" || fail "mount $dir, from /etc/fstab"
systemctl is-active -q data-xray.mount || fail "systemd does not know the mount"
diff -r /srv/source "$dir" || fail "other bytes than those pushed"
say "installed, configured and mounted by the package and the pages alone"

# --- readers -------------------------------------------------------------------------------------------
# Past the page cache, so that each read asks whoever serves; the large file is the kernel's.
reader() { # NUMBER
    local number=0
    while [ ! -e /tmp/stop ]; do
        number=$((number % 20 + 1))
        dd if="$dir/f$number" iflag=direct bs=64k status=none 2>>"/out/reader-$1.log" | cmp - "/srv/source/f$number" >>"/out/reader-$1.log" 2>&1 ||
            echo "ERROR f$number" >>"/out/reader-$1.log"
        [ "$(ls "$dir" | wc -l)" = 21 ] || echo "ERROR listing" >>"/out/reader-$1.log"
        echo . >>"/out/rounds-$1"
    done
}
exec 5<"$dir/large"
for number in 1 2 3; do reader $number & done
rounds() { cat /out/rounds-* 2>/dev/null | wc -l; }
go_on() { # They have read ten times more, with whoever serves now; and no error.
    local from
    from=$(rounds)
    until_true "readers go on" eval '[ "$(rounds)" -gt $((from + 10)) ]'
    ! grep -h ERROR /out/reader-*.log || fail "a reader noticed: $1"
    say "$1: nobody noticed ($(rounds) rounds)"
}
go_on "nothing"

for _ in $(seq "$KILLS"); do
    before=$(pid_of larder)
    kill -9 "$before"
    until_true "another daemon" is_another larder "$before"
done
go_on "kill -9 of the daemon, $KILLS times"
for _ in $(seq "$KILLS"); do
    before=$(pid_of larder-keeper)
    kill -9 "$before"
    until_true "another keeper" is_another larder-keeper "$before"
    until_true "the daemon" is_another larder 0
done
go_on "kill -9 of the keeper, $KILLS times"
for _ in $(seq "$KILLS"); do
    keeper=$(pid_of larder-keeper) daemon=$(pid_of larder)
    kill -9 "$keeper" "$daemon"
    until_true "another keeper" is_another larder-keeper "$keeper"
    until_true "another daemon" is_another larder "$daemon"
done
go_on "kill -9 of both at once, $KILLS times"
systemctl restart larder || fail "systemctl restart larder"
go_on "systemctl restart larder"
before=$(pid_of larder)
systemctl reload larder-keeper || fail "systemctl reload larder-keeper"
go_on "systemctl reload larder-keeper"
[ "$(pid_of larder)" = "$before" ] || fail "a reload of the keeper has ended the daemon"

# --- a new version -------------------------------------------------------------------------------------
before=$(pid_of larder)
dpkg -i newer.deb >/out/dpkg.log 2>&1 || fail "dpkg -i newer.deb: $(cat /out/dpkg.log)"
until_true "the new daemon" is_another larder "$before"
for unit in larder larder-keeper; do
    until_true "$unit is the new program" bash -c "[ \"\$(readlink /proc/$(pid_of $unit)/exe)\" = /usr/bin/larder ]"
done
go_on "another version of the package"

# --- a daemon that hangs, and one that is away -----------------------------------------------------------
before=$(pid_of larder)
kill -STOP "$before"
BOUND=240 until_true "the watchdog ends a daemon that hangs" is_another larder "$before"
go_on "a daemon that hangs, ended by the watchdog"
systemctl stop larder || fail "systemctl stop larder"
grep -q " $dir fuse.larder " /proc/mounts || fail "stopping the daemon takes the mount away"
systemctl start larder || fail "systemctl start larder"
go_on "systemctl stop and start"
cmp /srv/source/large - <&5 || fail "the large file, open all the time, has other bytes"
stored=$(systemctl show -P NFileDescriptorStore larder-keeper)
[ "$stored" = 3 ] || fail "systemd holds $stored descriptors for one mount"
touch /tmp/stop
wait
exec 5<&-

# --- stopped, started, and taken away ----------------------------------------------------------------------
systemctl stop larder-keeper || fail "systemctl stop larder-keeper"
[ "$(systemctl is-active larder)" = inactive ] || fail "without its keeper the daemon runs"
! grep "fuse.larder" /proc/mounts || fail "a stopped keeper leaves a mount"
systemctl start larder || fail "the daemon does not start its keeper"
until_true "the mount comes back" serves
diff -r /srv/source "$dir" || fail "other bytes after the stop"
say "stopped and started: the mount is there again"
objects=$(find /mnt/tier/objects -type f | wc -l)
dpkg -r larder >/out/dpkg.log 2>&1 || fail "dpkg -r: $(cat /out/dpkg.log)"
! grep "fuse.larder" /proc/mounts || fail "dpkg -r leaves a mount"
! ls -l /proc/[0-9]*/exe 2>/dev/null | grep /usr/bin/larder || fail "dpkg -r leaves a process"
[ -d /var/lib/larder ] && [ -e /etc/larder/larder.toml ] || fail "dpkg -r takes state or configuration"
dpkg -P larder >/out/dpkg.log 2>&1 || fail "dpkg -P: $(cat /out/dpkg.log)"
[ -z "$(ls /var/lib/larder 2>/dev/null)" ] && [ ! -e /etc/larder ] || fail "dpkg -P leaves state or configuration"
[ "$(find /mnt/tier/objects -type f | wc -l)" = "$objects" ] || fail "dpkg -P touches the tier"
! systemctl --failed --no-legend | grep larder || fail "a unit failed"
! journalctl -b --no-pager | grep -E 'panicked|WARN.*service manager was not told' || fail "the journal has it"
say "removed and purged, with nothing left but the tier"
