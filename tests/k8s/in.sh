#!/usr/bin/env bash
# Runs a command inside the cluster's network namespace, with kubectl and its configuration at hand:
#   tests/k8s/in.sh kubectl get pods -A
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export KUBECONFIG PATH="$BIN:$PATH"
exec nsenter --net="/run/netns/$NETNS" -- "$@"
