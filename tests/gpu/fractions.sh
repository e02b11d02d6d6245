#!/usr/bin/env bash
# Jobs on a real GPU: discovery by NVML, whole GPUs and parts, the memory limit of CUDA's multi-process service.
# For a machine with an NVIDIA GPU, its driver, python3 and this binary; no container engine, no lake needed.
#
#   LARDER_BIN=target/release/larder tests/gpu/fractions.sh
#
# Prints a line for each thing it has seen, and `skipped:` for what this machine lacks. Ends badly where something
# does not hold.
set -euo pipefail

bin=$(readlink -f "${LARDER_BIN:-target/release/larder}")
home=$(mktemp -d)
export HOME=$home CUDA_MPS_PIPE_DIRECTORY=$home/mps CUDA_MPS_LOG_DIRECTORY=$home/mps-log
mps=

larder() { "$bin" -q "$@"; }
ok() { echo "ok: $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
end() {
    larder job delete --all -p team >/dev/null 2>&1 || true
    larder scheduler stop >/dev/null 2>&1 || true
    if [ -n "$mps" ]; then echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true; fi
    rm -rf "$home"
}
trap end EXIT

# Asks CUDA's own library for memory: $1 MiB. Says what it got, how much there is, and what was visible.
cat >"$home/take.py" <<'PY'
import ctypes, os, sys
cuda = ctypes.CDLL("libcuda.so.1")
count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
pointer, size = ctypes.c_uint64(), int(sys.argv[1]) << 20
assert cuda.cuInit(0) == 0, "cuInit"
assert cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device) == 0, "cuCtxCreate"
got = cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
print("devices", count.value, "allocated" if got == 0 else f"refused {got}", os.environ.get("LARDER_GPU_MEMORY_BYTES"), flush=True)
PY

larder scheduler run >"$home/scheduler.log" 2>&1 &
for _ in $(seq 600); do larder scheduler status >/dev/null 2>&1 && break || sleep 0.1; done
larder node add here || fail "no GPU was found"
larder node list --json >"$home/nodes.json"
count=$(python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))[0]["node"]["gpus"])' "$home/nodes.json")
seen=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
[ "$count" = "$seen" ] || fail "$count GPUs were found, nvidia-smi knows $seen"
ok "$count GPUs"
memory=$(python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))[0]["gpus"][0].get("memory_bytes") or 0)' "$home/nodes.json")
[ "$memory" -gt 0 ] || fail "NVML told no memory"
ok "NVML: $(python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))[0]["gpus"][0])' "$home/nodes.json")"

larder project create team --gpus "$count"
run() { # NAME GPUS MiB: gives what take.py printed
    larder submit "$1" -p team -g "$2" -- python3 "$home/take.py" "$3"
    larder job wait "$1" -p team || fail "$1: $(larder job logs "$1" -p team)"
    larder job logs "$1" -p team
}
whole=$((memory / 1048576))
told=$(run whole 1 $((whole / 2)))
case $told in *"devices 1 allocated"*) ok "a whole GPU: $told" ;; *) fail "$told" ;; esac

larder submit busy -p team -g 1 -- python3 -c "import time; exec(open('$home/take.py').read()); time.sleep(1000)" 1024
for _ in $(seq 300); do larder job logs busy -p team | grep -q allocated && break || sleep 0.2; done
larder job top
larder job top --json | python3 -c 'import json,sys; assert json.load(sys.stdin)["loads"][0]["memory_used_bytes"] > 1 << 30' ||
    fail "job top does not see the memory"
ok "job top shows the memory"
larder job delete busy -p team

if ! command -v nvidia-cuda-mps-control >/dev/null; then
    echo "skipped: there is no nvidia-cuda-mps-control"
    exit 0
fi
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
nvidia-cuda-mps-control -d
mps=1
told=$(run less 0.25 $((whole / 10)))
case $told in *allocated*$((memory / 4))*) ok "a part has what it may have: $told" ;; *) fail "$told" ;; esac
told=$(run more 0.25 $((whole / 2)))
case $told in *refused*) ok "a part has no more than that: $told" ;; *) fail "the limit does not hold: $told" ;; esac
