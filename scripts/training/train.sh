#!/usr/bin/env bash
# Train on this machine, or on this one of several. From any directory:
#
#     DATASET_CONFIG=mixture.yaml MODEL_PATH=models/base OUTPUT_DIR=runs/a scripts/training/train.sh [flags of train/main.py]
#
# NUM_GPUS      processes on this machine [one per GPU]
# NODE_COUNT    machines [1]; MIN:MAX lets machines come and go (docs/engine.md)
# MASTER_ADDR   a machine that all of them reach, the same for all [localhost]; MASTER_PORT a free port there [29500]
# RUN_ID        a name that the machines of one run share [weft]; MAX_RESTARTS how often torchrun starts failed ranks again [0]
# OMP_NUM_THREADS  threads of a rank [beside GPUs, the cores that a rank has; without, as torchrun: one if there are several]
# LOG_DIR       writes what each rank prints into a file of its own there
# PYTHON        [python]
#
# Flags that are given win over the variables. A run that was asked to stop ends with 75: the same line goes on with it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

launcher=(--nproc_per_node="${NUM_GPUS:-gpu}" --max_restarts="${MAX_RESTARTS:-0}")
if [ "${NODE_COUNT:-1}" = 1 ]; then
    launcher+=(--standalone)
else
    endpoint="${MASTER_ADDR:?the machine that all of them reach}:${MASTER_PORT:-29500}"
    launcher+=(--nnodes="$NODE_COUNT" --rdzv_backend=c10d --rdzv_endpoint="$endpoint" --rdzv_id="${RUN_ID:-weft}")
fi
if [ -n "${LOG_DIR:-}" ]; then
    launcher+=(--log_dir="$LOG_DIR" --redirects=3 --tee=0:3)
fi

exec "${PYTHON:-python}" "$root/train/distributed/launch.py" "${launcher[@]}" "$root/train/main.py" \
    --dataset_config_file "${DATASET_CONFIG:?a mixture (YAML)}" \
    --model_path "${MODEL_PATH:?a model directory}" \
    --results_dir "${OUTPUT_DIR:?where the run goes}" \
    "$@"
