#!/usr/bin/env bash
# Installs what Debian has, builds every Kubernetes program as one Go binary, and packs the images that the cluster
# itself needs. Does nothing where all of it is there. Minutes when Go's cache is empty.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
umask 022
mkdir -p "$BIN" "$STATE/log" "$STATE/images"

packages() {
    local missing=() pair
    for pair in containerd:containerd runc:runc ip:iproute2 busybox:busybox-static openssl:openssl \
        iptables:iptables /usr/lib/cni/bridge:containernetworking-plugins; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    apt-get update -qq >"$STATE/log/apt.log" 2>&1
    export DEBIAN_FRONTEND=noninteractive
    # Twice: another `apt-get update` at the same time can take the archives away.
    apt-get install -y --no-install-recommends "${missing[@]}" >>"$STATE/log/apt.log" 2>&1 ||
        apt-get install -y --no-install-recommends "${missing[@]}" >>"$STATE/log/apt.log" 2>&1
}

programs() {
    local module=$here/cluster release minor stamp version=k8s.io/component-base/version name
    release=$(sed -n 's/^[[:space:]]*k8s.io\/kubernetes \(v[^ ]*\).*/\1/p' "$module/go.mod" | head -n1)
    stamp=$(cat "$module"/go.mod "$module"/*.go "$module"/*/*.go | sha256sum | cut -d' ' -f1)
    [ "$(cat "$BIN/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say "building Kubernetes $release"
    minor=${release#v1.}
    (
        cd "$module"
        CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$BIN/" -ldflags "-s -w \
            -X $version.gitVersion=$release -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*} \
            -X $version.gitTreeState=clean" \
            . ./pause github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner
    )
    for name in etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
        ln -sf k8s-kit "$BIN/$name"
    done
    rm -f "$STATE"/images/{pause,busybox,csi-provisioner}.tar
    echo "$stamp" >"$BIN/.stamp"
}

# No registry: every image is packed here, and used with imagePullPolicy Never or IfNotPresent.
image() { # image NAME FUNCTION ENTRYPOINT: the function fills the directory it is given
    [ ! -s "$STATE/images/$1.tar" ] || return 0
    local root
    root=$(mktemp -d)
    "$2" "$root"
    "$here/../../scripts/oci" --name "localhost/$1:kit" --entrypoint "$3" --out "$STATE/images/$1.tar" "$root"
    rm -rf "$root"
}

fill_pause() { cp "$BIN/pause" "$1/pause"; }
fill_provisioner() { cp "$BIN/csi-provisioner" "$1/csi-provisioner"; }
fill_busybox() {
    local name
    mkdir -p "$1"/{bin,tmp,etc}
    chmod 1777 "$1/tmp"
    echo 'root:x:0:0:root:/:/bin/sh' >"$1/etc/passwd"
    cp "$(command -v busybox)" "$1/bin/busybox"
    for name in $("$1/bin/busybox" --list); do
        [ "$name" = busybox ] || ln -s busybox "$1/bin/$name"
    done
}

packages
programs
image pause fill_pause /pause
image busybox fill_busybox /bin/sh
image csi-provisioner fill_provisioner /csi-provisioner
