#!/usr/bin/env bash
# Ends what up.sh started, and nothing else; what was built stays for the next start.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"

# up.sh writes this before it starts or mounts anything.
if [ ! -s "$STATE/settings" ]; then
    say "nothing was started from $STATE"
    exit 0
fi
enter "$0" "$@"

# First the kubelet, so that nothing is started again; then the processes of its pods; then their shims, which are
# known by the socket that they were started for.
end_pods() {
    local pids comm pid
    stop kubelet
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        pids=$(pod_processes)
        [ -n "$pids" ] || break
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null
        sleep 0.5
    done
    cat "$RUN"/containerd/io.containerd.runtime.v2.task/k8s.io/*/address 2>/dev/null | sed 's/unix:/\n/g' |
        while read -r socket; do [ -z "$socket" ] || rm -f "$socket"; done
    for comm in /proc/[0-9]*/comm; do
        [ "$(cat "$comm" 2>/dev/null)" = containerd-shim ] || continue
        pid=${comm#/proc/}
        pid=${pid%/comm}
        case $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) in
        *" -address $RUN/containerd.sock "*) kill -KILL "$pid" ;;
        esac
    done
}

# Mounts below our folders, the newest first.
unmount_all() {
    local at
    awk '{print $5}' /proc/self/mountinfo | tac | while read -r at; do
        at=$(printf '%b' "$at")
        case $at in
        "$KUBELET_DIR"/* | "$RUN"/* | "$STATE"/*) umount -l "$at" ;;
        esac
    done
    [ ! -s "$STATE/shared" ] || while read -r at; do umount -R -l "$at"; done <"$STATE/shared"
    rm -f "$STATE/shared"
}

restore_settings() {
    local key value
    while read -r key value; do
        [ "$(cat "/proc/sys/$key")" = "$value" ] || echo "$value" >"/proc/sys/$key"
    done <"$STATE/settings"
}

remove_state() {
    local name hierarchy result id
    for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/*; do
        [ -d "$hierarchy/kubepods" ] && find "$hierarchy/kubepods" -depth -type d -exec rmdir {} + 2>/dev/null
    done
    for name in etcd kubelet containerd pki etc pod-logs shared-dirs admin.kubeconfig; do
        rm -rf --one-file-system "${STATE:?}/$name"
    done
    rm -rf --one-file-system "${RUN:?}"
    # shellcheck disable=SC2086
    rmdir "$KUBELET_DIR" $SHARED_DIRS 2>/dev/null
    find /var/log/containers -xtype l -delete 2>/dev/null
    for result in /var/lib/cni/results/kit-*-eth0; do
        id=${result#*/kit-}
        rm -f "$result" "/var/lib/cni/results/cni-loopback-${id%-eth0}-lo"
    done
}

end_pods
for name in kube-proxy kube-scheduler kube-controller-manager kube-apiserver containerd etcd; do
    stop $name
done
unmount_all
restore_settings
if mountpoint -q "$KUBELET_DIR"; then
    echo "$KUBELET_DIR is still mounted; its state stays" >&2
    exit 1
fi
remove_state
rm -f "$STATE/settings"
# With it go the bridge, the addresses and kube-proxy's rules.
ip netns del "$NETNS"
say "stopped"
