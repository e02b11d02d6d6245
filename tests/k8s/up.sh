#!/usr/bin/env bash
# Starts a real Kubernetes of one node and returns when the node is ready: build.sh, then about ten seconds.
#   tests/k8s/up.sh
#   tests/k8s/in.sh kubectl get nodes
#   SHARED_DIRS="/a /b" tests/k8s/up.sh      more folders below which pods and host share mounts
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
umask 022
if [ "$(id -u)" != 0 ]; then
    echo "up.sh: needs root" >&2
    exit 1
fi
[ "${IN_NETNS:-}" = "$NETNS" ] || "$here/build.sh"
enter "$0" "$@"

refuse_a_second_one() {
    local name
    for name in etcd kube-apiserver containerd kubelet; do
        if alive "$name"; then
            echo "$name runs already: $here/down.sh first" >&2
            exit 1
        fi
    done
    if [ -n "$(pod_processes)" ]; then
        echo "pods run here already: this kit's ($here/down.sh), or another kubelet's" >&2
        exit 1
    fi
    if [ ! -s "$STATE/settings" ] && mountpoint -q "$KUBELET_DIR"; then
        echo "$KUBELET_DIR is a mount of somebody else" >&2
        exit 1
    fi
}

# Mounts that a privileged pod makes below these folders are seen by the host and by other pods; the propagation of
# everything else stays as it was.
share() { # share DIRECTORY SOURCE
    mkdir -p "$1" "$2"
    mountpoint -q "$1" || { mount --bind "$2" "$1" && echo "$1" >>"$STATE/shared"; }
    mount --make-rshared "$1"
}

folders() {
    local key
    rm -rf "$STATE/log"
    mkdir -p "$STATE"/{log,pid,etc/cni,kubelet,containerd,pki,pod-logs} "$RUN"
    [ -s "$STATE/settings" ] || for key in $SETTINGS; do
        [ ! -r "/proc/sys/$key" ] || echo "$key $(cat "/proc/sys/$key")"
    done >"$STATE/settings"
    share "$KUBELET_DIR" "$STATE/kubelet"
    for key in $SHARED_DIRS; do share "$key" "$STATE/shared-dirs$key"; done
    ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
    ip addr replace "$NODE_IP/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    echo 1 >/proc/sys/net/ipv4/ip_forward
}

token() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
kubeconfig() { # kubeconfig FILE USER
    local secret
    secret=$(sed -n "s/^\([0-9a-f]*\),$2,.*/\1/p" "$STATE/pki/tokens.csv")
    cat >"$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: kit, cluster: {server: "https://$NODE_IP:6443", certificate-authority: "$STATE/pki/apiserver.crt"}}]
users: [{name: me, user: {token: "$secret"}}]
contexts: [{name: kit, context: {cluster: kit, user: me}}]
current-context: kit
YAML
}

# Tokens for the programs of the cluster; the API server makes a certificate of its own.
keys() (
    umask 077
    cat >"$STATE/pki/tokens.csv" <<CSV
$(token),admin,admin,"system:masters"
$(token),system:kube-controller-manager,kcm
$(token),system:kube-scheduler,scheduler
$(token),system:kube-proxy,kube-proxy
$(token),system:node:$NODE_NAME,node,"system:nodes"
CSV
    openssl genrsa -out "$STATE/pki/sa.key" 2048 2>/dev/null
    kubeconfig "$KUBECONFIG" admin
    kubeconfig "$STATE/etc/kcm.kubeconfig" system:kube-controller-manager
    kubeconfig "$STATE/etc/scheduler.kubeconfig" system:kube-scheduler
    kubeconfig "$STATE/etc/kube-proxy.kubeconfig" system:kube-proxy
    kubeconfig "$STATE/etc/kubelet.kubeconfig" "system:node:$NODE_NAME"
)

control_plane() {
    start etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
        --initial-cluster default=http://127.0.0.1:2380
    start kube-apiserver "$BIN/kube-apiserver" --etcd-servers http://127.0.0.1:2379 \
        --bind-address "$NODE_IP" --advertise-address "$NODE_IP" --secure-port 6443 \
        --cert-dir "$STATE/pki" --token-auth-file "$STATE/pki/tokens.csv" \
        --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged=true \
        --service-account-issuer https://kubernetes.default.svc \
        --service-account-key-file "$STATE/pki/sa.key" --service-account-signing-key-file "$STATE/pki/sa.key" \
        --service-cluster-ip-range 10.96.0.0/16 --kubelet-preferred-address-types InternalIP
}

# After the API server answers, since they want its certificate.
controllers() {
    # Claims of volumes that exist are bound at the next look: 15 s apart as it comes, too slow for tests.
    start kube-controller-manager "$BIN/kube-controller-manager" --kubeconfig "$STATE/etc/kcm.kubeconfig" \
        --service-account-private-key-file "$STATE/pki/sa.key" --root-ca-file "$STATE/pki/apiserver.crt" \
        --use-service-account-credentials=true --leader-elect=false --secure-port 0 \
        --flex-volume-plugin-dir "$STATE/kubelet/flexvolume" --pvclaimbinder-sync-period 1s
    start kube-scheduler "$BIN/kube-scheduler" --kubeconfig "$STATE/etc/scheduler.kubeconfig" \
        --leader-elect=false --secure-port 0
    cat >"$STATE/etc/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: "$STATE/etc/kube-proxy.kubeconfig"}
mode: iptables
iptables: {localhostNodePorts: false}
hostnameOverride: $NODE_NAME
bindAddress: $NODE_IP
clusterCIDR: ${NODE_IP%.*}.0/24
healthzBindAddress: "127.0.0.1:10256"
metricsBindAddress: "127.0.0.1:10249"
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
    start kube-proxy "$BIN/kube-proxy" --config "$STATE/etc/kube-proxy.yaml"
}

container_runtime() {
    cat >"$STATE/etc/containerd.toml" <<TOML
version = 2
root = "$STATE/containerd"
state = "$RUN/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]

[grpc]
  address = "$RUN/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "$STATE/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:kit"
  # Where root may not lower a score (no CAP_SYS_RESOURCE), no pod would start without this.
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$STATE/etc/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "$RUN/runc"
TOML
    cat >"$STATE/etc/cni/10-kit.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "kit", "plugins": [
  {"type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$RUN/cni",
            "ranges": [[{"subnet": "${NODE_IP%.*}.0/24", "gateway": "$NODE_IP"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
    start containerd containerd --config "$STATE/etc/containerd.toml"
    wait_for 60 containerd ctr -a "$RUN/containerd.sock" version
    "$here/load.sh" "$STATE"/images/*.tar >>"$STATE/log/images.log" 2>&1
}

node() {
    echo 'nameserver 127.0.0.1' >"$STATE/etc/resolv.conf" # the cluster has no DNS
    cat >"$STATE/etc/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $NODE_IP
healthzPort: 0
# Inside the network namespace only.
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://$RUN/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
protectKernelDefaults: false
makeIPTablesUtilChains: false
podLogsDir: $STATE/pod-logs
volumePluginDir: $STATE/kubelet/flexvolume
resolvConf: $STATE/etc/resolv.conf
# Images cannot be pulled again: none is collected, and nothing is evicted for disk.
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 50Mi, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%}
nodeStatusUpdateFrequency: 4s
syncFrequency: 10s
YAML
    "$here/kubelet.sh" start
}

refuse_a_second_one
folders
keys
say "starting etcd, kube-apiserver, containerd"
control_plane
container_runtime
wait_for 180 kube-apiserver kubectl get --raw /readyz
say "starting the controllers, kube-proxy and the kubelet"
controllers
node
wait_for 180 "the node" kubectl wait --for=condition=Ready --timeout=1s "node/$NODE_NAME"
wait_for 60 "the default service account" kubectl get serviceaccount default
say "$NODE_NAME is ready; KUBECONFIG=$KUBECONFIG"
