#!/usr/bin/env bash
# Set up what the tests need (tools/setup_env.sh says where and how), then run them. Arguments go to pytest; paths among
# them are relative to the repository: ./tests/run.sh tests/unit -k config
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

# The distributed tests start up to eight processes: one thread each, or they fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
