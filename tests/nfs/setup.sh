#!/bin/bash
# Fetches what the NFS test guest needs, as Debian packages that are only
# unpacked (dpkg -x), never installed, and builds the guest's base initramfs.
# Nothing on the host changes but the cache folder. Run again after a change
# under guest/; it downloads only what is missing.
#
#   LARDER_NFS_KERNEL  a kernel's package, or its series as 6.12: the newest one that apt knows
#                      (default: what linux-image-cloud-amd64 depends on)
#   LARDER_NFS_CACHE   where it all goes (default: $XDG_CACHE_HOME/larder-nfs, and -KERNEL where one is named)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wanted_kernel=${LARDER_NFS_KERNEL:-}
cache=${LARDER_NFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-nfs${wanted_kernel:+-$wanted_kernel}}
packages="qemu-system-x86 busybox-static nfs-kernel-server nfs-common rpcbind iproute2"

mkdir -p "$cache/debs/partial"
cd "$cache"

# --- 1. packages -----------------------------------------------------------
case $wanted_kernel in
'') kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n1) ;;
[0-9]*) kernel=$(apt-cache pkgnames "linux-image-$wanted_kernel." 2>/dev/null |
    grep -E -- '-cloud-amd64$' | sort -V | tail -n1) ;;
*) kernel=$wanted_kernel ;;
esac
if [ -z "$kernel" ]; then
    echo "setup.sh: apt knows no kernel ${wanted_kernel:-package}; run 'apt-get update' first" >&2
    exit 1
fi
stamp="$packages $kernel"
if [ "$(cat stamp 2>/dev/null)" != "$stamp" ]; then
    rm -rf root
    # The libraries these need that the host lacks come along as dependencies;
    # those that it has are taken from the host. --reinstall: also get a
    # package that the host has already.
    apt-get install -y -q --no-install-recommends --download-only --reinstall \
        -o Dir::Cache::archives="$cache/debs" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User=root $packages >apt.log 2>&1 ||
        { cat apt.log >&2; exit 1; }
    (cd debs && apt-get download -q -o APT::Sandbox::User=root "$kernel" >>../apt.log 2>&1) ||
        { cat apt.log >&2; exit 1; }
    mkdir root.new
    for deb in debs/*.deb; do dpkg -x "$deb" root.new; done
    find root.new -name '*.ko.xz' -exec root.new/bin/busybox unxz {} + # newer kernels'
    mv root.new root
    echo "$stamp" >stamp
fi
root=$cache/root
krel=${kernel#linux-image-}
cp "$root/boot/vmlinuz-$krel" vmlinuz
export LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu

# --- 2. initramfs ----------------------------------------------------------
bb=$root/bin/busybox
img=$cache/initramfs
rm -rf "$img"
mkdir -p "$img"/{bin,sbin,dev,proc,sys,run,tmp,etc,out,payload,mnt,srv/export}
mkdir -p "$img"/{usr/sbin,lib/x86_64-linux-gnu,lib64,var/lib/nfs/{sm,sm.bak,v4recovery,rpc_pipefs,nfsdcld}}
ln -s ../run "$img/var/run"

# A program of the host or of the unpacked packages, with its libraries.
add_program() { # SOURCE DEST
    cp -L "$1" "$img/$2"
    chmod 755 "$img/$2"
    ldd "$1" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\s*\(\/lib64\/[^ ]*\) .*/\1/p' |
        while read -r lib; do
            case $lib in
            /lib64/*) cp -Lu "$lib" "$img/lib64/" ;;
            *) cp -Lu "$lib" "$img/lib/x86_64-linux-gnu/" ;;
            esac
        done
}
for p in rpc.mountd rpc.nfsd exportfs nfsdcld nfsstat; do
    add_program "$root/usr/sbin/$p" "sbin/$p"
done
for p in mount.nfs rpc.statd rpcbind; do add_program "$root/sbin/$p" "sbin/$p"; done
ln -s mount.nfs "$img/sbin/mount.nfs4"
for p in ip tc; do
    f=$root/sbin/$p; [ -e "$f" ] || f=$root/bin/$p
    add_program "$f" "sbin/$p"
done
# glibc libraries that a dynamically linked Rust program loads; the loader
# finds them in the default path.
for l in libgcc_s.so.1 libm.so.6 libc.so.6 libpthread.so.0 libdl.so.2 librt.so.1; do
    cp -L "/lib/x86_64-linux-gnu/$l" "$img/lib/x86_64-linux-gnu/"
done
cp "$bb" "$img/bin/busybox"
for a in $("$bb" --list); do
    [ "$a" = busybox ] || [ -e "$img/sbin/$a" ] || ln -s busybox "$img/bin/$a"
done
ln -s ../bin/busybox "$img/sbin/modprobe" # where the kernel looks for it

# Modules: the named ones and all that they need.
base=$root # newer kernel packages have them in /usr/lib
[ -d "$root/usr/lib/modules/$krel" ] && base=$root/usr
mods=$base/lib/modules/$krel
"$bb" depmod -b "$base" "$krel"
wanted="virtio_pci virtio_blk virtio_net nfsd nfs nfsv3 nfsv4
 rpcsec_gss_krb5 fuse erofs overlay loop brd veth bridge sch_netem dm-flakey"
kmod_path() { find "$mods/kernel" \( -name "$1.ko" -o -name "$(echo "$1" | tr _ -).ko" \) | head -n1; }
need() { # module path relative to $mods, and what modules.dep lists after it
    local line dep
    [ -e "$img/lib/modules/$krel/$1" ] && return
    mkdir -p "$img/lib/modules/$krel/$(dirname "$1")"
    cp "$mods/$1" "$img/lib/modules/$krel/$1"
    line=$(grep "^$1:" "$mods/modules.dep" || true)
    for dep in ${line#*:}; do need "$dep"; done
}
for m in $wanted; do
    f=$(kmod_path "$m")
    [ -z "$f" ] || need "${f#"$mods/"}" # some are built into some kernels
done
cp "$mods/modules.builtin" "$img/lib/modules/$krel/" 2>/dev/null || true
"$bb" depmod -b "$img" "$krel"

cp "$root/etc/netconfig" "$img/etc/" 2>/dev/null ||
    cp /etc/netconfig "$img/etc/" 2>/dev/null ||
    dpkg --fsys-tarfile debs/libtirpc-common_*.deb | tar xO ./etc/netconfig >"$img/etc/netconfig"
cat >"$img/etc/passwd" <<E
root:x:0:0:root:/:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
statd:x:100:65534::/var/lib/nfs:/bin/false
_rpc:x:101:65534::/run/rpcbind:/bin/false
E
printf 'root:x:0:\nnogroup:x:65534:\n' >"$img/etc/group"
printf '127.0.0.1 localhost\n10.99.0.1 server\n' >"$img/etc/hosts"
printf 'hosts: files\npasswd: files\ngroup: files\nservices: files\nrpc: files\n' >"$img/etc/nsswitch.conf"
cp /etc/services "$img/etc/" 2>/dev/null || true
cp /etc/rpc "$img/etc/" 2>/dev/null || true
printf 'tcp 6 TCP\nudp 17 UDP\n' >"$img/etc/protocols"
ln -sf /proc/self/mounts "$img/etc/mtab"
install -m 755 "$here/guest/init" "$img/init"
install -m 644 "$here/guest/nfs.sh" "$img/nfs.sh"

(cd "$img" && find . | "$bb" cpio -o -H newc -R 0:0) >base.cpio 2>/dev/null
echo "kernel $krel, initramfs $(stat -c %s base.cpio | awk '{printf "%.0f MB", $1/1e6}'), in $cache"
