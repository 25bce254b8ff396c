#!/usr/bin/env bash
# Several machines through accelerate. Run it on each, with NODE=0 on the first, NODE=1 on the second, and so on:
#
#   HEAD=node0 NODE=0 NODES=2 CARDS=8 examples/many_cards/accelerate.sh --config run.yaml
#
# HEAD is the first machine's name, CARDS those of each machine. All machines see the model, the data and --output under
# the same paths. qlora decides dtypes and compilation itself, so what `accelerate config` says of them is overridden.
set -euo pipefail

exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "${NODES:-2}" --machine_rank "$NODE" --num_processes "$((${NODES:-2} * ${CARDS:-8}))" \
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
    -m qlora_cli train "$@"
