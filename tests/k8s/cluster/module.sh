#!/bin/sh
# Writes go.mod and go.sum anew for another release: sh module.sh v1.36.3 [PROVISIONER]
# k8s.io/kubernetes replaces the modules beside it by folders that its zip file does not use; here each one is
# replaced by its published twin (v1.X.Y -> v0.X.Y).
set -eu
cd "$(dirname "$0")"
release=${1:?which release, such as v1.36.3}
provisioner=${2:-v6.3.0}
twin=v0.${release#v1.}
upstream=$(go mod download -json "k8s.io/kubernetes@$release" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
etcd=$(sed -n 's/.*go.etcd.io\/etcd\/client\/v3 \(v[^ ]*\).*/\1/p' "$upstream" | head -n 1)
{
	echo "module larder.io/k8s-kit"
	echo
	sed -n '/^go /p;/^godebug /p' "$upstream"
	echo
	echo "tool github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"
	echo
	echo "require ("
	echo "	k8s.io/kubernetes $release"
	echo "	go.etcd.io/etcd/server/v3 $etcd"
	echo "	github.com/kubernetes-csi/external-provisioner/v6 $provisioner"
	echo ")"
	echo
	echo "replace ("
	sed -n "s/^\(.*\) => .\/staging.*/\1 => TWIN\1 $twin/p" "$upstream" | sed 's/TWIN[[:space:]]*//'
	echo ")"
} >go.mod
rm -f go.sum
go mod tidy
