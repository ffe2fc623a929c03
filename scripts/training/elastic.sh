#!/usr/bin/env bash
# Train on a number of machines that may change: on each of them, with the variables of train.sh,
#
#     MASTER_ADDR=node0 NODES=1:4 scripts/training/elastic.sh [flags of train/main.py]
#
# When a machine joins, all ranks save and go on with it; when one is lost, the others go on from the newest checkpoint.
set -euo pipefail
export NODE_COUNT="${NODES:?MIN:MAX}" MAX_RESTARTS="${MAX_RESTARTS:-10}"
exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" --auto_resume True "$@"
