#!/usr/bin/env bash
# The quickstart: data, autoencoder, training, evaluation, report. `make demo` calls it; started again after a kill it goes on.
#
#     bash scripts/quickstart.sh .venv/bin runs/quickstart
#
# In the environment: SEED (0), PROCESSES (2).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
mkdir -p "$2"
run=$(cd "$2" && pwd)
seed=${SEED:-0} processes=${PROCESSES:-2}
data="$run/data" base="$run/base"
export WEFT_DATA="$data" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

times="$run/times.txt"
: >"$times"

# stage NAME COMMAND...: run one step and note its wall time
stage() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s ==\n' "$name"
    "$@"
    printf '%-12s %5d s\n' "$name" $((SECONDS - start)) >>"$times"
}

make_data() {
    if [ ! -f "$data/manifest.json" ]; then
        "$bin/python" scripts/data/make_quickstart.py --output_dir "$data" --seed "$seed" --workers "$processes"
    fi
    [ -f "$base/tokenizer.json" ] ||
        "$bin/python" scripts/data/make_quickstart_model.py --data_dir "$data" --output_dir "$base"
}

train_autoencoder() {
    [ -f "$base/ae.safetensors" ] || "$bin/torchrun" --nproc_per_node="$processes" train/main_autoencoder.py \
        --image_dir "$data/train/images" --val_dir "$data/val/images" --output_dir "$base" --seed "$seed"
}

train_model() {
    "$bin/torchrun" --nproc_per_node="$processes" train/main.py --config configs/quickstart_run.yaml \
        --dataset_config_file configs/quickstart.yaml --model_path "$base" \
        --results_dir "$run" --checkpoint_dir "$run/checkpoints" --global_seed "$seed"
}

evaluate() {
    local shard pids=()
    set -- --model_path "$run/model" --data_dir "$data" --output_dir "$run" --seed "$seed" --num_shards "$processes"
    for ((shard = 0; shard < processes; shard++)); do
        "$bin/python" -m inference_pipeline.evaluate "$@" --shard "$shard" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
    "$bin/python" -m inference_pipeline.evaluate "$@" --merge
    "$bin/python" -m inference_pipeline.parse_statistics_to_csv -d "$run" -o "$run/summary.csv" -v
    "$bin/python" -m inference_pipeline.report --run_dir "$run" --output "$run/report.html"
}

stage data make_data
stage autoencoder train_autoencoder
stage training train_model
stage evaluation evaluate

printf '\n'
cat "$times"
printf 'open %s/report.html\n' "$run"
