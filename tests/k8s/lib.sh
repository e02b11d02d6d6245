# shellcheck shell=bash disable=SC2034
# Shared by the scripts beside it: names, places, processes. All state is below $STATE; elsewhere the kit has only
# what has a fixed place: the kubelet's folder, a short folder for sockets, one network namespace and its cgroups.
#
# LARDER_K8S_CACHE   where programs, images and state are  (default: $XDG_CACHE_HOME/larder-k8s)

STATE=$(realpath -m "${LARDER_K8S_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-k8s}")
case $STATE in ?*/?*) ;; *) echo "LARDER_K8S_CACHE=$STATE is no directory of its own" >&2; exit 1 ;; esac
mkdir -p "$STATE"
BIN=$STATE/bin
KUBECONFIG=$STATE/admin.kubeconfig
KUBELET_DIR=/var/lib/kubelet
RUN=/run/larder-k8s # a path of a socket has 107 bytes at most
NETNS=larder-k8s
BRIDGE=k8s0
NODE_IP=10.88.0.1
NODE_NAME=node1
# What else pods and host share mounts below: the state of the node programs, since the keeper may mount there.
SHARED_DIRS=${SHARED_DIRS:-/var/lib/larder}

# Kernel settings that are not of the network namespace and that the kubelet changes; down.sh puts them back.
SETTINGS='vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes'

say() { printf '%s %s\n' "$(date +%T)" "$*"; }

# The cluster lives in a network namespace: no address of it exists outside, and nothing in it reaches beyond.
enter() { # enter SCRIPT ARGUMENT...: runs the script again, inside
    [ "${IN_NETNS:-}" != "$NETNS" ] || return 0
    [ -e "/run/netns/$NETNS" ] || { ip netns add "$NETNS" && ip -n "$NETNS" link set lo up; }
    export IN_NETNS=$NETNS
    exec nsenter --net="/run/netns/$NETNS" -- bash "$@"
}

kubectl() { "$BIN/kubectl" --kubeconfig "$KUBECONFIG" "$@"; }
ctr_k8s() { ctr -a "$RUN/containerd.sock" -n k8s.io "$@"; }

# When a process began, in clock ticks since boot: with it a process id names one process.
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

alive() { # alive NAME: whether the process that was started under this name is there
    local pid when
    [ -s "$STATE/pid/$1" ] || return 1
    read -r pid when <"$STATE/pid/$1"
    [ "$(born "$pid")" = "$when" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null
}

start() { # start NAME COMMAND...
    local name=$1
    shift
    setsid "$@" >>"$STATE/log/$name.log" 2>&1 </dev/null &
    echo "$! $(born $!)" >"$STATE/pid/$name"
}

stop() { # stop NAME: asks it to end, and ends it after ten seconds
    local pid when tries=0
    if alive "$1"; then
        read -r pid when <"$STATE/pid/$1"
        kill -TERM "$pid" 2>/dev/null || true
        while alive "$1" && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
        if alive "$1"; then kill -KILL "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$STATE/pid/$1"
}

wait_for() { # wait_for SECONDS WHAT COMMAND...
    local tries=$(($1 * 5)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "gave up waiting for $what; logs are in $STATE/log" >&2; return 1; }
        sleep 0.2
    done
}

# The processes of all pods of this machine's kubelet.
pod_processes() {
    find /sys/fs/cgroup/pids/kubepods /sys/fs/cgroup/kubepods -name cgroup.procs -exec cat {} + 2>/dev/null || true
}
