#!/bin/bash
# sbatch tools/launch/slurm.sh --recipe strong --arch resnet50 --data /data/shards --output /runs/strong
#
# Trains on all GPUs of two nodes; change the numbers below. If a process dies, torchrun restarts all processes. 90 seconds before
# the time limit, or at preemption, the run saves a checkpoint and the job is requeued, to continue at the exact sample. A job
# with other numbers but the same --output continues the same run. --output must be on storage that all nodes share.
#SBATCH --job-name=cropfeed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopped=
trap 'stopped=yes; kill -TERM "$steps"' TERM # srun forwards it to torchrun, which forwards it to train.py
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    train.py --amp bf16 --resume auto "$@" &
steps=$!
wait "$steps"
status=$?
if [ -n "$stopped" ]; then
    wait "$steps" # the signal has interrupted the first wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
