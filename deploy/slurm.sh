#!/bin/bash
# A run on a Slurm cluster: sbatch deploy/slurm.sh (docs/many-machines.md).
#
# srun starts one process a GPU; torchrun is not needed here, and would keep Slurm's signals from
# the processes. Ten minutes before its time is over the run saves, leaves with status 75 and is
# queued again, until it is done.
#
#SBATCH --job-name=longtake
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=longtake-%j.log

set -u
MAX_RESTARTS=3

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

run() {
    # A port of its own for every attempt: the last one's may still be taken.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + attempt) % 20000))
    # --wait ends, a minute after the first process has ended, those that cannot end by themselves.
    srun --wait=60 --kill-on-bad-exit=0 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec python -m longtake "$@"
    ' longtake "$@"
}

for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
    run train --preset stdit-xl2-16x256 --name clips-16x256 --output /shared/runs \
        --data.manifest /shared/clips.csv
    status=$?
    case $status in
        0) exit 0 ;;
        2) exit 2 ;; # a mistake that its message explains: trying again would not mend it
        75) scontrol requeue "$SLURM_JOB_ID" && exit 0 ;;
    esac
    echo "attempt $attempt ended with status $status"
done
exit "$status"
