#!/usr/bin/env bash
# Make a root file system that holds another Slurm than this machine's, for tests/slurm: tests/slurm/make_root.sh [DIR]
#
# in_root.sh calls it, and runs the tests there.
# DIR: default $MEGATRON_JQ_SLURM_ROOT, else .slurm/SUITE in the repository. A DIR that is complete is left as it is; one
# appears only once it is complete. Needs root, debootstrap and Debian's packages. 300 MB, a minute of a processor.
#   SUITE     which Debian: trixie (default) has Slurm 24.11, bookworm 22.05
#   MIRROR    where from (default: debootstrap's own)
#   SECONDS_AT_MOST   default 600
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
suite=${SUITE:-trixie}
root=$(realpath -m -- "${1:-${MEGATRON_JQ_SLURM_ROOT:-$repository/.slurm/$suite}}")

fail() {
    echo "make_root: error: $*" >&2
    exit 1
}

if [[ -e $root ]]; then
    [[ -x $root/usr/sbin/slurmctld ]] || fail "$root is there and holds no Slurm: name another folder, or remove it"
    exit 0
fi
[[ $EUID == 0 ]] || fail "root file systems are made by root"
command -v debootstrap >/dev/null || fail "debootstrap is not installed (Debian: apt-get install debootstrap)"

mkdir -p -- "$(dirname -- "$root")"
# Beside its place, so that the last step is a rename. A lock, as two may want it at once.
exec 9>"$root.lock"
flock -w "${SECONDS_AT_MOST:-600}" 9 || fail "another one has been making $root for ${SECONDS_AT_MOST:-600} s"
[[ ! -e $root ]] || exec "$0" "$root"
partial=$root.partial
rm -rf --one-file-system -- "$partial"
# libpython3-stdlib: for the libraries that the tests' own interpreter wants.
packages=slurmctld,slurmd,slurm-client,munge,iproute2,procps,libpython3-stdlib
code=0
# In namespaces: what it mounts and starts there is gone with them, however it ends.
timeout --foreground --signal=KILL "${SECONDS_AT_MOST:-600}" \
    unshare --mount --pid --fork --kill-child --mount-proc debootstrap --variant=minbase --include="$packages" \
    "$suite" "$partial" ${MIRROR:+"$MIRROR"} >"$root.log" 2>&1 || code=$?
if [[ $code != 0 ]]; then
    tail -n 5 -- "$root.log" "$partial/debootstrap/debootstrap.log" >&2 2>/dev/null || true
    rm -rf --one-file-system -- "$partial"
    [[ $code != 137 ]] || fail "not complete after ${SECONDS_AT_MOST:-600} s (SECONDS_AT_MOST)"
    fail "debootstrap $suite ended with $code; what it said last is above, the rest in $root.log"
fi
rm -rf -- "$partial"/var/cache/apt/archives/*.deb "$partial"/var/lib/apt/lists/*
chroot "$partial" slurmctld -V || fail "the Slurm in $partial does not run"
mv -- "$partial" "$root"
rm -f -- "$root.log"
