#!/usr/bin/env bash
# Run tests/slurm on another version of Slurm than this machine's: tests/slurm/in_root.sh [pytest arguments]
#
#   tests/slurm/in_root.sh -k preempted
#
# MEGATRON_JQ_SLURM_ROOT names the folder of a root file system that holds it; make_root.sh makes one where there is none
# (default: .slurm/trixie, Slurm 24.11). All of pytest runs in that root, in a mount namespace of its own, with this
# repository, the Python environment and the folder for temporary files as they are here. Needs root.
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
export MEGATRON_JQ_SLURM_ROOT=${MEGATRON_JQ_SLURM_ROOT:-$repository/.slurm/${SUITE:-trixie}}
MEGATRON_JQ_SLURM_ROOT=$(realpath -m -- "$MEGATRON_JQ_SLURM_ROOT")
"$repository/tests/slurm/make_root.sh"
# shellcheck source=tools/setup_env.sh
source "$repository/tools/setup_env.sh"
mapfile -t folders < <(python -c '
import sys, tempfile, pathlib
for name in (sys.base_prefix, sys.prefix, tempfile.gettempdir()): print(pathlib.Path(name).resolve())
')
if [[ ${folders[0]} == /usr ]]; then
    echo "in_root: error: python is /usr's own, and the root has another /usr: use one from elsewhere (PYTHON)" >&2
    exit 1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false MEGATRON_JQ_IN_SLURM_ROOT=1
mapfile -t folders < <(printf '%s\n' "$repository" "${folders[@]}" | sort -u)
# shellcheck disable=SC2016 # the inner shell expands it
exec unshare --mount "$repository/tests/slurm/enter_root.sh" "$MEGATRON_JQ_SLURM_ROOT" "${folders[@]}" -- \
    bash -c 'cd -- "$1" && shift && exec python -m pytest tests/slurm "$@"' pytest "$repository" "$@"
