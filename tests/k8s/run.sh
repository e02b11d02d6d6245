#!/usr/bin/env bash
# Larder on a real Kubernetes, from nothing: cluster, image, chart, pods by all three ways, kills while they read,
# uninstall. One line for each step, with its time. `make test-k8s` calls it.
#
#   LARDER_BIN     the program                      (default: the release build)
#   KILLS          how often the driver is ended    (default: 50)
#   KEEP=1         leaves everything up at the end, or where a step failed
#   LARDER_HELM    helm                             (default: tests/kit/helm.sh)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/lib.sh"

LARDER=$(realpath "${LARDER_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/larder}")
KILLS=${KILLS:-50}
WORK=$STATE/work
IMAGE=localhost/larder:test
LAKE=http://$NODE_IP:9000
STEPS=0

if [ "$(id -u)" != 0 ] || [ ! -e /dev/fuse ]; then
    echo "test-k8s: needs root and /dev/fuse" >&2
    exit 1
fi

# ------------------------------------------------------------------------------------------------------- the frame

step() { # step SENTENCE FUNCTION ARGUMENT...
    local what=$1 began=$SECONDS log
    shift
    STEPS=$((STEPS + 1))
    log=$WORK/step-$STEPS.log
    # In the background, since a failure inside a condition would end nothing.
    (set -euo pipefail; "$@") >"$log" 2>&1 &
    if wait $!; then
        printf 'ok    %4d s  %s\n' $((SECONDS - began)) "$what"
    else
        printf 'FAIL  %4d s  %s\n' $((SECONDS - began)) "$what"
        tail -n 40 "$log" >&2
        echo "test-k8s: the whole log is $log; those of the cluster are in $STATE/log" >&2
        exit 1
    fi
}

finish() {
    local status=$?
    if [ "${KEEP:-}" = 1 ]; then
        echo "left up: $here/in.sh kubectl get pods -A; $here/down.sh ends it"
    else
        stop lake
        "$here/down.sh" >"$WORK/down.log" 2>&1 || status=1
    fi
    exit $status
}

inside() { nsenter --net="/run/netns/$NETNS" -- "$@"; }
kubectl() { inside "$BIN/kubectl" --kubeconfig "$KUBECONFIG" "$@"; }
helm() { inside env KUBECONFIG="$KUBECONFIG" HELM_CONFIG_HOME="$WORK/helm" HELM_CACHE_HOME="$WORK/helm" HELM_DATA_HOME="$WORK/helm" "$HELM" "$@"; }
larder() { inside env -i PATH="$PATH" HOME="$WORK" LARDER_STATE="$WORK/state" LARDER_LAKE=s3://larder/test LARDER_ENDPOINT="$LAKE" \
    AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test-secret-of-the-lake "$LARDER" "$@"; }

# Polls, and never asks how long something takes: machines differ by a factor of ten.
until_true() { # until_true SECONDS COMMAND...
    local limit=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $limit ] || { echo "still not: $*"; return 1; }
        sleep 0.5
    done
}

# ----------------------------------------------------------------------------------------------------- the material

# Two classes of small pictures, so that there is something to learn, and a file that is a pack of its own.
make_data() {
    mkdir -p "$WORK"
    python3 - "$WORK/pictures" <<'PY'
import os, random, sys
random.seed(8)
root = sys.argv[1]
for label, (low, high) in {"dark": (0, 140), "light": (110, 255)}.items():
    for number in range(300):
        folder = os.path.join(root, label, f"{number % 10:02d}")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{number:04d}.pgm"), "wb") as file:
            file.write(b"P5 64 64 255\n" + bytes(random.randint(low, high) for _ in range(64 * 64)))
with open(os.path.join(root, "large.bin"), "wb") as file:
    file.write(random.randbytes(80 << 20))
PY
    (cd "$WORK/pictures" && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1) >"$WORK/digest"
}
# The same in a pod.
DIGEST='cd /data && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d" " -f1'

start_lake() {
    inside bash -c '. "$1"; shift; start lake "$@"' -- "$here/lib.sh" env LARDER_SERVE_ACCESS_KEY=test \
        LARDER_SERVE_SECRET_KEY=test-secret-of-the-lake "$LARDER" lake serve "$WORK/lake" --listen "$NODE_IP:9000" --no-fsync
    until_true 120 larder lake init
    larder push "$WORK/pictures" pictures --tag v1
}

# Debian's Python, unpacked: the image for the training job.
python_image() {
    local folder=$STATE/python package
    [ ! -s "$STATE/images/python.tar" ] || return 0
    rm -rf "$folder"
    mkdir -p "$folder/debs" "$folder/root"/{tmp,proc,dev,etc}
    chmod 1777 "$folder/root/tmp"
    package=$(apt-cache depends python3-minimal | sed -n 's/.*Depends: \(python3\.[0-9]*-minimal\)$/\1/p' | head -n1)
    (cd "$folder/debs" && apt-get download -qq "$package" "lib$package")
    for package in "$folder"/debs/*.deb; do dpkg-deb -x "$package" "$folder/root"; done
    ln -s "$(basename "$(ls "$folder"/root/usr/bin/python3.*)")" "$folder/root/usr/bin/python3"
    for package in bin lib lib64; do [ -e "$folder/root/$package" ] || { mkdir -p "$folder/root/usr/$package"; ln -s "usr/$package" "$folder/root/$package"; }; done
    ldd "$folder/root/usr/bin/python3" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) .*/\1/p' |
        while read -r package; do install -Dm755 "$(realpath "$package")" "$folder/root/usr/lib/$(basename "$package")"; done
    install -Dm755 "$(realpath /lib64/ld-linux-x86-64.so.2)" "$folder/root/usr/lib64/ld-linux-x86-64.so.2"
    "$root/scripts/oci" --name localhost/python:kit --out "$STATE/images/python.tar" "$folder/root"
    rm -rf "$folder"
}

images() {
    python_image
    IMAGE=$IMAGE "$root/scripts/image" "$LARDER" "$WORK"
    "$here/load.sh" "$WORK/larder-image-amd64.tar" "$STATE/images/python.tar"
}

values() {
    cat <<YAML
lake:
  url: s3://larder/test
  endpoint: $LAKE
  existingSecret: lake
image: {repository: localhost/larder, tag: test, pullPolicy: Never}
node:
  peers: false
  daemon: {log: "info"}
controller:
  replicas: 1
  provisioner: {image: "localhost/csi-provisioner:kit", pullPolicy: Never}
test: {dataset: pictures@v1, image: "localhost/busybox:kit", pullPolicy: Never}
uninstall: {whenInUse: ${1:-refuse}, timeout: 10m}
tiers: [{name: local, hostPath: {path: /var/lib/larder/tier}}] # below a folder that is shared
config: |
  # round ${2:-0}
YAML
}

# A page of the docs' manifests, with images that are here.
example() {
    sed -e 's,docker.io/library/busybox:.*,localhost/busybox:kit,; s,docker.io/library/python:.*,localhost/python:kit,' "$root/examples/kubernetes/$1.yaml"
}

reader() { # reader NAME VOLUME: a pod that reads everything again and again, and ends at the first error or wrong byte
    cat <<YAML
apiVersion: v1
kind: Pod
metadata: {name: $1, labels: {app: reader}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - name: read
      image: localhost/busybox:kit
      imagePullPolicy: Never
      command: [sh, -c]
      args:
        - |
          rounds=0
          while :; do
              got=\$($DIGEST) || { echo "cannot read"; exit 1; }
              [ "\$got" = $(cat "$WORK/digest") ] || { echo "wrong bytes: \$got"; exit 1; }
              rounds=\$((rounds + 1))
              echo "round \$rounds"
          done
      volumeMounts: [{name: data, mountPath: /data, readOnly: true}]
  volumes:
    - name: data
      $2
YAML
}
INLINE='csi: {driver: csi.larder.io, readOnly: true, volumeAttributes: {dataset: pictures@v1}}'

# Nothing where the kubelet does not answer for a moment.
rounds() { kubectl logs "$1" --tail 1 2>/dev/null | sed -n 's/^round //p' || true; }
has_read() { [ "$(rounds "$1")" -ge "$2" ] 2>/dev/null; }
readers() { kubectl get pods -l app=reader -o name; }
no_reader_failed() { [ -z "$(kubectl get pods -l app=reader --field-selector status.phase!=Running -o name)" ]; }

# -------------------------------------------------------------------------------------------------------- the steps

install_chart() {
    kubectl create namespace larder
    kubectl -n larder create secret generic lake --from-literal=AWS_ACCESS_KEY_ID=test --from-literal=AWS_SECRET_ACCESS_KEY=test-secret-of-the-lake
    values >"$WORK/values.yaml"
    helm install larder "$root/helm/larder" -n larder -f "$WORK/values.yaml" --wait --timeout 10m
}

helm_test() { helm test larder -n larder --logs --timeout 10m; }

three_ways() {
    local way
    for way in inline volume claim; do example "$way" | kubectl apply -f -; done
    for way in inline volume claim; do
        kubectl wait --for=jsonpath='{.status.phase}'=Succeeded "pod/read-$way" --timeout=10m ||
            { kubectl describe pod "read-$way"; kubectl logs "read-$way"; return 1; }
        kubectl logs "read-$way"
        [ "$(kubectl logs "read-$way" | tail -n1)" = "$(find "$WORK/pictures" -type f -exec cat {} + | wc -c)" ]
    done
    for way in inline volume claim; do example "$way" | kubectl delete -f - --wait --timeout=5m; done
}

digests() {
    local way
    for way in volume claim; do
        example "$way" | awk 'BEGIN { RS = "---\n"; ORS = "---\n" } !/kind: Pod\n/' | kubectl apply -f -
    done
    reader reader-inline "$INLINE" | kubectl apply -f -
    reader reader-volume 'persistentVolumeClaim: {claimName: pictures-v1, readOnly: true}' | kubectl apply -f -
    reader reader-claim 'persistentVolumeClaim: {claimName: pictures, readOnly: true}' | kubectl apply -f -
    for way in inline volume claim; do
        until_true 600 has_read "reader-$way" 1
    done
}

event() { # event REASON TEXT: some event says it
    kubectl get events -A -o jsonpath='{range .items[*]}{.reason}{" "}{.message}{"\n"}{end}' | grep -F "$1" | grep -F "$2"
}

tells() {
    until_true 300 event LarderMounted "pictures@v1 is commit"
    reader nowhere 'csi: {driver: csi.larder.io, readOnly: true, volumeAttributes: {dataset: nothing@v7}}' | sed 's/app: reader/app: wrong/' | kubectl apply -f -
    until_true 300 event FailedMount "nothing"
    kubectl delete pod nowhere --wait --timeout=5m
    reader writer 'csi: {driver: csi.larder.io, volumeAttributes: {dataset: pictures@v1}}' | sed 's/app: reader/app: wrong/' | kubectl apply -f -
    until_true 300 event FailedMount "readOnly"
    kubectl delete pod writer --wait --timeout=5m
}

# The mounts that pods see: place, and the device that says which are the same.
mounts() { awk -v below="$KUBELET_DIR/" '/ - (fuse.larder|erofs) / && index($5, below) == 1 {print $5, $3}' /proc/self/mountinfo; }

twenty() {
    local number
    for number in $(seq 20); do
        reader "many-$number" "$INLINE" | sed 's/while :; do/while [ $rounds -lt 1 ]; do/; s/^          done/          done; sleep 100000/'
        echo ---
    done | sed '$d' | kubectl apply -f -
    for number in $(seq 20); do until_true 900 has_read "many-$number" 1; done
    mounts
    [ "$(mounts | wc -l)" -ge 23 ] # with those of the step before
    [ "$(mounts | cut -d' ' -f2 | sort -u | wc -l)" = 1 ]
    kubectl delete pods $(seq -f 'many-%g' 20) --wait --timeout=10m
}

train() {
    example train | kubectl apply -f -
    kubectl wait --for=condition=Complete job/train --timeout=20m || { kubectl describe job train; kubectl logs job/train; return 1; }
    kubectl logs job/train
    kubectl logs job/train | tail -n1 | grep -E 'accuracy (0\.9|1\.0)'
    example train | kubectl delete -f - --wait
}

# Every reader reads everything once more, from the daemon and not from the page cache.
go_on() {
    local pod before
    for pod in $(readers); do
        until_true 900 has_read "$pod" 1
        before=$(rounds "$pod")
        echo 3 >/proc/sys/vm/drop_caches
        until_true 900 has_read "$pod" $((before + 2))
    done
    no_reader_failed
}

node_pod() { kubectl -n larder get pods -l app.kubernetes.io/component=node -o jsonpath='{.items[0].metadata.name}'; }

# The processes of pods whose command line has this in it. No other process of the machine is looked at.
in_pods() {
    local pid
    for pid in $(pod_processes); do
        if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "$1"; then echo "$pid"; fi
    done
}
kill_in_pods() { # as the kernel does it when there is no memory
    local pid
    for pid in $(in_pods "$1"); do kill -KILL "$pid" || true; done
}

# The driver's pod is deleted, or its daemon or driver killed, again and again.
kills() {
    local number
    for number in $(seq "$KILLS"); do
        case $((number % 5)) in
        0) kubectl -n larder delete pod "$(node_pod)" --wait=false ;;
        1 | 3) kill_in_pods 'larder daemon --foreground --keep-mounts' ;;
        2) kubectl -n larder delete pod "$(node_pod)" --grace-period=0 --force ;;
        4) kill_in_pods 'larder csi --mode node' ;;
        esac
        echo 3 >/proc/sys/vm/drop_caches
        sleep 1 # spreads the kills over what the readers do; nothing waits for it
        no_reader_failed
    done
    go_on
}

upgrade() {
    local before
    before=$(node_pod)
    values refuse 1 >"$WORK/values.yaml"
    helm upgrade larder "$root/helm/larder" -n larder -f "$WORK/values.yaml" --wait --timeout 15m
    kubectl -n larder rollout status daemonset/larder-node --timeout=15m
    [ "$(node_pod)" != "$before" ]
    go_on
}

node_restarts() {
    "$here/kubelet.sh" restart
    "$here/kubelet.sh" restart-containerd
    until_true 300 kubectl wait --for=condition=Ready "node/$NODE_NAME" --timeout=10s
    go_on
    reader reader-later "$INLINE" | kubectl apply -f - # the driver is known to the new kubelet
    until_true 600 has_read reader-later 1
}

keeper_is_replaced() {
    kubectl -n larder delete pod -l app.kubernetes.io/component=keeper --wait --timeout=5m
    until_true 600 kubectl -n larder wait --for=condition=Ready pod -l app.kubernetes.io/component=keeper --timeout=10s
    go_on
    reader reader-last "$INLINE" | kubectl apply -f -
    until_true 600 has_read reader-last 1
}

uninstall_is_refused() {
    if helm uninstall larder -n larder --timeout 5m; then
        echo "it went although pods read"
        return 1
    fi
    kubectl -n larder logs job/larder-uninstall
    kubectl -n larder logs job/larder-uninstall | grep -F reader-inline
    go_on
}

# Helm takes the release for one that is being uninstalled, and upgrades none such.
uninstall_drains() {
    helm rollback larder 2 -n larder --wait --timeout 15m
    values drain 1 >"$WORK/values.yaml"
    helm upgrade larder "$root/helm/larder" -n larder -f "$WORK/values.yaml" --wait --timeout 15m
    helm uninstall larder -n larder --wait --timeout 20m
    [ -z "$(readers)" ]
}

is_empty() { [ -z "$("$@")" ]; }
nothing_is_left() {
    until_true 120 is_empty mounts
    until_true 120 is_empty in_pods '^/usr/bin/larder '
    find "$KUBELET_DIR/plugins" "$KUBELET_DIR/plugins_registry" /var/lib/larder -type s
    [ -z "$(find "$KUBELET_DIR/plugins" "$KUBELET_DIR/plugins_registry" /var/lib/larder -type s)" ]
    [ -z "$(kubectl get csidriver,storageclass,clusterrole,clusterrolebinding -o name | grep larder)" ]
}

main() {
    local began=$SECONDS
    rm -rf "$WORK"
    mkdir -p "$WORK"
    trap finish EXIT
    HELM=${LARDER_HELM:-$("$root/tests/kit/helm.sh")/bin/helm}
    step "Kubernetes is built" "$here/build.sh"
    step "a cluster of one node is ready" "$here/up.sh"
    step "a dataset is pushed to a lake" eval 'make_data; start_lake'
    step "the image is made and loaded" images
    step "helm install" install_chart
    step "helm test" helm_test
    step "pods read by all three ways: inline, PersistentVolume, StorageClass" three_ways
    step "they go on reading, with the right digests" digests
    step "events tell the commit, a dataset that is not there, a volume that is to be written" tells
    step "20 pods more share one mount" twenty
    step "a job trains from a commit" train
    step "helm upgrade replaces the driver while pods read" upgrade
    step "$KILLS deletions and kills of driver and daemon while pods read" kills
    step "kubelet and containerd start again while pods read" node_restarts
    step "the keeper is replaced while pods read" keeper_is_replaced
    step "helm uninstall is refused while pods read" uninstall_is_refused
    step "helm uninstall drains" uninstall_drains
    step "no mount, socket, process or object is left" nothing_is_left
    printf 'test-k8s: all %d steps, %d s\n' "$STEPS" $((SECONDS - began))
}

main
