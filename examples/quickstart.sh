#!/usr/bin/env bash
# The main job in small, with its own set-up: one cold start, three estimators, the same steps and rollouts, under tensor
# parallelism over two processes on a CPU. Ends with a table and escape.png.
#
#   ./examples/quickstart.sh [FOLDER]     FOLDER: where the runs go (default: runs/quickstart-DATE-TIME in the repository)
set -euo pipefail
trap 'exit 130' INT  # a run that Ctrl-C meets saves and ends well: the next one would begin

folder=${1:-}
[[ -z $folder ]] || folder=$(realpath -m -- "$folder")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh
folder=${folder:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}

# Two processes, one core each.
export OMP_NUM_THREADS=1

train() {
    local name=$1
    shift
    echo
    echo "== $name =="
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_jq train \
        --config examples/quickstart/common.toml --run-dir "$folder/$name" "$@"
}

began=$SECONDS
train garl-q0.75 --estimator garl --q 0.75
train garl-q0 --estimator garl --q 0
train grpo --estimator grpo

echo
python tools/plot_run.py "$folder"/garl-q0.75 "$folder"/garl-q0 "$folder"/grpo --output "$folder/escape.png"
echo "trained for $((SECONDS - began)) s in all; picture: $folder/escape.png"
