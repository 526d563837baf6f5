#!/bin/bash
# sbatch nodes.sh: four nodes of eight GPUs; 32 processes take one clip each, so a step of 32 needs no accumulation.
# Five minutes before its time is over the run is told to stop, saves the last whole step and goes to the queue again;
# there the same line goes on.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
again() {
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun bash -c "accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $((8*SLURM_NNODES)) --machine_rank \$SLURM_NODEID --main_process_ip $head --main_process_port 29500 \
  --mixed_precision bf16 \$(which sfv-lite) distil --resume --recipe svd --set accumulation=1 --base svd --data shards -o runs/student" &
run=$!
wait "$run"
