#!/usr/bin/env bash
# Starts and stops the kubelet, or containerd, of a cluster that runs, as an upgrade of a node does:
#   tests/k8s/kubelet.sh start | stop | restart | restart-containerd
# Pods go on meanwhile.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
enter "$0" "$@"

start_kubelet() {
    start kubelet "$BIN/kubelet" --config "$STATE/etc/kubelet.yaml" --root-dir "$KUBELET_DIR" \
        --kubeconfig "$STATE/etc/kubelet.kubeconfig" --cert-dir "$STATE/pki" \
        --hostname-override "$NODE_NAME" --node-ip "$NODE_IP"
}

case ${1:-} in
start) start_kubelet ;;
stop) stop kubelet ;;
restart)
    stop kubelet
    start_kubelet
    # It ends where containerd does not answer when it starts, and nobody here starts it again.
    wait_for 180 "the kubelet" kubectl get --raw "/api/v1/nodes/$NODE_NAME/proxy/healthz"
    ;;
restart-containerd)
    stop containerd
    start containerd containerd --config "$STATE/etc/containerd.toml"
    wait_for 60 containerd ctr -a "$RUN/containerd.sock" version
    ;;
*) sed -n '2,4p' "$0" >&2; exit 2 ;;
esac
