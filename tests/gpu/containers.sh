#!/usr/bin/env bash
# A container of a job sees its GPU, by CDI. For a machine with an NVIDIA GPU, podman (or docker) and the NVIDIA
# container toolkit's CDI specification (`nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`).
#
#   LARDER_BIN=target/release/larder IMAGE=docker.io/library/debian:12 tests/gpu/containers.sh
set -euo pipefail

bin=$(readlink -f "${LARDER_BIN:-target/release/larder}")
image=${IMAGE:?name an image with a shell}
home=$(mktemp -d)
export HOME=$home
larder() { "$bin" -q "$@"; }
end() {
    larder job delete --all -p team >/dev/null 2>&1 || true
    larder scheduler stop >/dev/null 2>&1 || true
    rm -rf "$home"
}
trap end EXIT

if ! ls /etc/cdi/*nvidia* /var/run/cdi/*nvidia* >/dev/null 2>&1; then
    echo "skipped: there is no CDI specification of the GPUs"
    exit 0
fi
larder scheduler run >"$home/scheduler.log" 2>&1 &
for _ in $(seq 600); do larder scheduler status >/dev/null 2>&1 && break || sleep 0.1; done
larder node add here
larder project create team --gpus 1
larder submit gpu -p team -i "$image" -g 1 -- sh -c 'echo "visible $NVIDIA_VISIBLE_DEVICES"; ls /dev/nvidia[0-9]*; nvidia-smi -L'
larder job wait gpu -p team || { larder job logs gpu -p team; exit 1; }
told=$(larder job logs gpu -p team)
echo "$told"
[ "$(grep -c '^GPU ' <<<"$told")" = 1 ] || { echo "FAILED: the container sees other GPUs than its one" >&2; exit 1; }
echo "ok: the container sees its GPU"
