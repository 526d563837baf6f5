#!/bin/bash
# sbatch nodes.sh: four nodes of eight GPUs; 32 processes take one clip each, so a step of 32 needs no accumulation.
# Five minutes before its time is over the run is told to stop, saves the last whole step and goes to the queue again;
# there the same line goes on.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
again() {
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500
# no workers, which the signal would end before the run has heard it, and no launcher in between: one would kill its processes half a minute after a signal, and a state takes longer to write
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec sfv-lite distil --resume \
  --recipe svd --set accumulation=1 --set workers=0 --base svd --data shards -o runs/student' &
run=$!
wait "$run"
