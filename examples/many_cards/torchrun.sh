#!/usr/bin/env bash
# Several machines through torchrun. Run it on each, with NODE=0 on the first, NODE=1 on the second, and so on:
#
#   HEAD=node0 NODE=0 NODES=2 CARDS=8 examples/many_cards/torchrun.sh --config run.yaml
#
# HEAD is the first machine's name, CARDS those of each machine. All machines see the model, the data and --output under
# the same paths. Add --resume to go on after a machine failed.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:-2}" --node-rank "$NODE" --nproc-per-node "${CARDS:-8}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" \
    -m qlora_cli train "$@"
