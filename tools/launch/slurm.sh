#!/bin/bash
# sbatch tools/launch/slurm.sh --recipe strong --arch resnet50 --data /data/shards --output /runs/strong
#
# Trains on all GPUs of two nodes; change the numbers below. Where a process dies, torchrun starts all of them again. A minute and a
# half before the time limit, or at preemption, the run saves and the job is queued again, to go on at the exact sample; so does a
# job with other numbers and the same --output, which must be on storage that all nodes share.
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
trap 'stopped=yes; kill -TERM "$steps"' TERM # srun passes it on to torchrun, that to train.py
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    train.py --amp bf16 --resume auto "$@" &
steps=$!
wait "$steps"
status=$?
if [ -n "$stopped" ]; then
    wait "$steps" # the first wait ended at the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
