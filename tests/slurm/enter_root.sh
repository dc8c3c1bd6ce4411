#!/usr/bin/env bash
# Run a command with another root file system. Started in a mount namespace of its own (in_root.sh does):
#
#   unshare --mount enter_root.sh ROOT FOLDER… -- COMMAND…
#
# Each FOLDER is seen at its own path inside. ROOT itself stays as it is: what is written there goes to memory, and goes
# away with the namespace. By pivot_root, as nsenter goes to the root of a namespace; it would not see a chroot.
set -euo pipefail

root=$1
shift
mount --make-rprivate /
stage=$root/mnt # empty, and there in every root
mount -t tmpfs -o mode=755 tmpfs "$stage"
mkdir "$stage"/{changes,work,root}
mount -t overlay -o "lowerdir=$root,upperdir=$stage/changes,workdir=$stage/work" overlay "$stage/root"
mkdir -p "$stage/root/old"
for folder in /proc /sys /dev; do mount --rbind "$folder" "$stage/root$folder"; done
while [[ $1 != -- ]]; do
    mkdir -p "$stage/root$1"
    mount --rbind "$1" "$stage/root$1"
    shift
done
shift
cd "$stage/root"
pivot_root . old
umount -l /old
cd /
exec "$@"
