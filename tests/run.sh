#!/usr/bin/env bash
# Set up what the tests need (tools/setup_env.sh says where and how), then run them. Arguments go to pytest; paths among
# them are relative to the repository: ./tests/run.sh tests/unit -k config
#
# Without arguments everything runs, for two cores: two processes share the tests, and those of tests/slurm, which
# mostly wait, run beside them in a third. What that one prints comes last; a failure of either fails the whole.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

# The distributed tests start up to eight processes: one thread each, or they fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
(($# == 0)) || exec python -m pytest "$@"

cluster_output=$(mktemp)
trap 'jobs -p | xargs --no-run-if-empty kill -INT; rm -f -- "$cluster_output"' EXIT
python -m pytest tests/slurm >"$cluster_output" 2>&1 &
cluster=$!
status=0 cluster_status=0
python -m pytest -n 2 --dist worksteal tests/unit tests/distributed tests/e2e tests/gpu || status=$?
wait "$cluster" || cluster_status=$?
printf '\ntests/slurm, which ran beside these:\n\n'
cat -- "$cluster_output"
exit $((status ? status : cluster_status))
