#!/usr/bin/env bash
# Run what depends on other people's versions on the newest of them: Megatron-core 0.19.2 and Slurm 24.11, beside each
# other. By hand, after the suite itself (tests/run.sh made the environment): half an hour on two cores.
#
# Megatron-core's environment shares all packages but Megatron-core and triton (tests/matrix.sh, MATRIX_SHARE). It gets
# tests/distributed, the checkpoints and conversions of tests/unit, and tests/e2e without the files about bad input,
# data, rewards, documents and a tool's figures. Slurm's root file system (tests/slurm/in_root.sh) needs root and
# debootstrap; what fails there beside the others is run once more, alone, and that result counts.
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
newest=0.19.2
on_the_newest=(
    tests/distributed tests/e2e
    tests/unit/test_{checkpoint_folder,checkpoint_shards,convert,hf_table,megatron_versions,reshard}.py
    --ignore=tests/e2e/test_{bad_input,bench,data_sets,document_commands}.py
    --ignore=tests/e2e/test_{extending_estimator,frames,own_reward,reasoning_gym,recipes}.py
)
status=0 slurm_status=0
slurm_output=$(mktemp) slurm=
trap 'jobs -p | xargs --no-run-if-empty kill -INT; rm -f -- "$slurm_output"' EXIT
in_root=("$repository/tests/slurm/in_root.sh" -o "cache_dir=$repository/.slurm/cache")
if "$repository/tests/slurm/make_root.sh"; then
    "${in_root[@]}" >"$slurm_output" 2>&1 &
    slurm=$!
else
    echo "versions: no root file system with Slurm 24.11 was made; nothing is tested on it" >&2
    status=1
fi

export MATRIX_SHARE=${MEGATRON_JQ_VENV:-${VIRTUAL_ENV:-$repository/.venv}}
"$repository/tests/matrix.sh" "$newest" "${on_the_newest[@]}" || status=$?
if [[ -n $slurm ]]; then
    wait "$slurm" || slurm_status=$?
    cat -- "$slurm_output"
    if [[ $slurm_status != 0 ]]; then
        printf '\nwhat failed there, once more, alone:\n\n'
        "${in_root[@]}" --last-failed || status=$?
    fi
fi
exit "$status"
