#!/usr/bin/env bash
# Several machines through SLURM:  sbatch examples/many_cards/slurm.sh --config run.yaml
#
# srun starts one process a card; nothing else is needed in between. Five minutes before the time limit the job gets
# SIGTERM, saves, and ends with code 143. Submitted again, it goes on from there: --resume starts anew where there is no
# checkpoint yet.
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${PORT:-29500}" WORLD_SIZE="$SLURM_NTASKS" OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

exec srun --kill-on-bad-exit=0 bash -c '
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-1}"
    exec python -m qlora_cli train "$@"' qlora "$@" --resume
