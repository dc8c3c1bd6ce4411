#!/usr/bin/env bash
# Pretrain → SFT → J_Q with one program: text to Megatron's indexed files, then three runs, each from the weights of the
# one before. One process on a CPU, with its own set-up.
#
#   ./examples/stages/run.sh [FOLDER]     FOLDER: where all of it goes (default: runs/stages-DATE-TIME in the repository)
set -euo pipefail
trap 'exit 130' INT  # a run that Ctrl-C meets saves and ends well: the next one would begin

folder=${1:-}
[[ -z $folder ]] || folder=$(realpath -m -- "$folder")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh
folder=${folder:-runs/stages-$(date +%Y%m%d-%H%M%S)}
export OMP_NUM_THREADS=1

train() {
    local stage=$1
    shift
    echo
    echo "== $stage =="
    python -m megatron_jq train --config "examples/stages/$stage.toml" --device cpu --run-dir "$folder/$stage" "$@"
}

python examples/stages/make_data.py "$folder"
python tools/preprocess_data.py --input "$folder/corpus.jsonl" --output-prefix "$folder/corpus" --append-eod \
    --tokenizer-vocab-size 384

problems=(--train-data "$folder/train.jsonl" --eval-data "$folder/test.jsonl")
began=$SECONDS
train pretrain --data-path "$folder/corpus_text_document" --tokenizer-model "$folder/corpus.tokenizer.model"
train sft --load "$folder/pretrain/checkpoints" --finetune "${problems[@]}"
train garl --load "$folder/sft/checkpoints" --finetune "${problems[@]}"

echo
echo "trained for $((SECONDS - began)) s in all; runs: $folder"
