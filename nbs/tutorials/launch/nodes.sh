#!/bin/bash
# sbatch nodes.sh: four nodes of eight GPUs; 32 processes take one clip each, so a step of 32 needs no accumulation
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun bash -c "accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $((8*SLURM_NNODES)) --machine_rank \$SLURM_NODEID --main_process_ip $head --main_process_port 29500 \
  --mixed_precision bf16 \$(which sfv-lite) distil --recipe svd --set accumulation=1 --base svd --data shards -o runs/student"
