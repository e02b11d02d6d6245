#!/bin/sh
# csi-sanity against `larder csi` with a real daemon and an embedded lake. Needs root, /dev/fuse and Go.
#
#   tests/k8s/sanity.sh [--reader-only|--stock]
#
# LARDER_BIN: the program (default: target/debug/larder). SANITY_CACHE: where the suites are kept once
# they are built (default: below the system's temporary folder). Builds take a minute or two, each run
# seconds.
#
# Two runs. `reader-only` is the one that judges: the suite with each access mode turned into
# MULTI_NODE_READER_ONLY (sanity-ro). `stock` is csi-sanity as it is released, which asks for
# SINGLE_NODE_WRITER everywhere: what needs a writable volume is skipped, as listed here.
set -eu

VERSION=v5.6.0
here=$(cd "$(dirname "$0")" && pwd)
bin=${LARDER_BIN:-$here/../../target/debug/larder}
cache=${SANITY_CACHE:-${TMPDIR:-/tmp}/larder-sanity}
which=${1:-both}

[ "$(id -u)" = 0 ] && [ -e /dev/fuse ] || { echo "skipped: needs root and /dev/fuse"; exit 0; }
command -v go >/dev/null || { echo "skipped: needs go"; exit 0; }

# Skipped of the stock suite, and why: each of these begins by making or using a volume that a single node
# writes. That is refused, with a sentence that says what to write instead. sanity-ro runs all of them.
# What the suites skip by themselves is what the driver does not offer and does not say it does: attaching,
# staging, listing, snapshots, clones, expansion, modification, capacity.
WRITERS='CreateVolume should return appropriate values SingleNodeWriter'
WRITERS="$WRITERS|CreateVolume should not fail when requesting to create a volume with already existing name and same capacity"
WRITERS="$WRITERS|CreateVolume should fail when requesting to create a volume with already existing name and different capacity"
WRITERS="$WRITERS|CreateVolume should not fail when creating volume with maximum-length name"
WRITERS="$WRITERS|DeleteVolume should return appropriate values"
WRITERS="$WRITERS|ValidateVolumeCapabilities should fail when no volume capabilities are provided"
WRITERS="$WRITERS|ValidateVolumeCapabilities should return appropriate values"
WRITERS="$WRITERS|NodeUnpublishVolume should remove target path"
WRITERS="$WRITERS|NodeGetVolumeStats should fail when volume does not exist on the specified path"
WRITERS="$WRITERS|NodeGetVolumeHealth should return health for a valid volume"
WRITERS="$WRITERS|Node Service should work|Node Service should be idempotent"

mkdir -p "$cache"
if [ "$which" != --stock ]; then
    (cd "$here/sanity-ro" && go build -o "$cache/sanity-ro" .)
fi
if [ "$which" != --reader-only ] && [ ! -x "$cache/csi-sanity" ]; then
    GOBIN=$cache go install "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$VERSION"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/larder-sanity.XXXXXX")
pids=
end() {
    status=$?
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do wait "$pid" 2>/dev/null || true; done
    "$bin" daemon stop >/dev/null 2>&1 || true
    grep " $work" /proc/mounts | cut -d' ' -f2 | sort -r | while read -r at; do umount -l "$at" || true; done
    [ "$status" = 0 ] || { echo "--- the driver's log"; tail -n 60 "$work/csi.log"; } >&2
    rm -rf "$work"
}
trap end EXIT

mkdir -p "$work/home" "$work/data" "$work/k/plugins_registry"
echo hello > "$work/data/file"
export HOME="$work/home" LARDER_STATE="$work/state"
unset LARDER_CONFIG LARDER_LAKE LARDER_SOCKET XDG_RUNTIME_DIR XDG_STATE_HOME XDG_DATA_HOME XDG_CONFIG_HOME KUBECONFIG || true
"$bin" --quiet push "$work/data" sanity
"$bin" --quiet daemon

socket=$work/k/csi.sock
"$bin" csi --mode all --kubelet-dir "$work/k" --csi-endpoint "$socket" --node sanity 2> "$work/csi.log" &
pids=$!
tries=0
until "$bin" csi --csi-endpoint "$socket" probe 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 240 ] || { echo "the driver does not answer" >&2; exit 1; }
    sleep 0.25
done

if [ "$which" != --stock ]; then
    echo "== csi-sanity $VERSION, reader only"
    "$cache/sanity-ro" -endpoint "$socket" -targets "$work/ro" -staging "$work/ro-staging" \
        -parameters "$here/sanity-parameters.yaml"
fi
if [ "$which" != --reader-only ]; then
    echo "== csi-sanity $VERSION, stock"
    "$cache/csi-sanity" --csi.endpoint "$socket" --csi.mountdir "$work/stock" --csi.stagingdir "$work/stock-staging" \
        --csi.testvolumeparameters "$here/sanity-parameters.yaml" --ginkgo.skip "$WRITERS"
fi
left=$(find "$work/k/plugins/csi.larder.io/volumes" "$work/k/plugins/csi.larder.io/mounts" -mindepth 1 2>/dev/null || true)
[ -z "$left" ] || { echo "left behind: $left" >&2; exit 1; }
echo "== nothing was left behind"
