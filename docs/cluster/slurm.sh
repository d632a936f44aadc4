#!/bin/bash
# A sweep on three nodes of a Slurm cluster: sbatch docs/cluster/slurm.sh sweeps/quickstart.yaml /shared/results
# Submitted again, it goes on from the results folder. Slurm warns the batch script 120 s before the time is up; the driver then has all
# running stages save themselves.
#SBATCH --job-name=fffsweep
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

config=${1:?a sweep config}
results=${2:?a results folder on a file system that all nodes share}
fffsweep=${FFFSWEEP:-.venv/bin/fffsweep}

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))') # reaches the nodes through srun's environment alone
export RAY_AUTH_TOKEN

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --overlap \
    "$fffsweep" cluster start --block --host "$address" --port "$port" -- --num-cpus="$SLURM_CPUS_ON_NODE" &
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        "$fffsweep" cluster join "$address:$port" --block -- --num-cpus="$SLURM_CPUS_ON_NODE" &
done
"$fffsweep" cluster wait "$address:$port" # the sweep begins with the head and takes the other nodes in as they come

"$fffsweep" run "$config" --results "$results" --address "$address:$port" &
driver=$!
trap 'kill -TERM $driver' TERM
wait "$driver" || wait "$driver"
