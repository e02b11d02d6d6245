#!/usr/bin/env bash
# Gives the cluster images from archives:
#   tests/k8s/load.sh dist/larder-image.tar ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
for archive; do
    ctr_k8s images import "$archive"
done
