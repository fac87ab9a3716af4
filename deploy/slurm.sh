#!/bin/bash
# Runs a command of deit-ray on the machines of a Slurm allocation, with a Ray cluster of its own:
#
#   sbatch deploy/slurm.sh tune experiments/imagenet_deit_small_search.yaml --set results.uri=/shared/results
#   sbatch deploy/slurm.sh tune --resume imagenet_deit_small_search --results /shared/results
#
# deit-ray must be installed on every node at the same path (activate its environment before sbatch), and data
# and results must be on a file system that every node mounts, or on s3://. When time runs out, Slurm sends
# SIGTERM two minutes before: the study stops, and the second command resumes it.
#
# Adapt these lines, and add your partition and account. The first node is the head, and trains too.
#SBATCH --job-name=deit-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=deit-ray-%j.log
set -euo pipefail

: "${SLURM_JOB_ID:?run this with sbatch, or in an allocation of salloc}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Every job has a port, a token and a folder of its own: jobs of several people can share a node.
port=$((20000 + SLURM_JOB_ID % 10000))
# Sockets below this folder must have short paths.
temporary=/tmp/ray-$SLURM_JOB_ID
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=600
start=(ray start --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --block)
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then start+=(--num-gpus="$SLURM_GPUS_ON_NODE"); fi

on() {  # on NODE COMMAND... &: becomes a command on one node, beside what runs there
  local node=$1
  shift
  exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "$@"
}

steps=()
stop() {
  for step in "${steps[@]}"; do kill "$step" 2> /dev/null || true; done
  wait
}
trap stop EXIT

address=$(on "$head" hostname --ip-address | awk '{print $1}'):$port
on "$head" "${start[@]}" --head --node-ip-address="${address%:*}" --port="$port" --temp-dir="$temporary" \
  --include-dashboard=false &
steps+=($!)
for _ in $(seq 120); do
  if ray health-check --address "$address" 2> /dev/null; then break; fi
  if ! kill -0 "${steps[0]}" 2> /dev/null; then
    echo "error: Ray has not started on $head; its output is above" >&2
    exit 1
  fi
  sleep 1
done
for node in "${nodes[@]:1}"; do
  on "$node" "${start[@]}" --address="$address" &
  steps+=($!)
done
# A plan is compared with what the cluster has when the command starts.
python3 - "$address" "${#nodes[@]}" << 'END'
import sys, time, ray
ray.init(sys.argv[1], logging_level="ERROR")
deadline = time.monotonic() + 300
while (found := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"error: {found} of {sys.argv[2]} nodes have started Ray; the output of the others is above")
    time.sleep(1)
END

# SIGTERM reaches this script alone (B: above), and bash passes it on.
deit-ray "$@" --address "$address" &
study=$!
trap 'kill -TERM $study' TERM INT
status=0
while kill -0 "$study" 2> /dev/null; do  # a signal ends `wait` early
  status=0
  wait "$study" || status=$?
done
exit "$status"
