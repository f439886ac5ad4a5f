#!/bin/bash
# Slurm: one Ray node on each machine of the allocation, one study on top, everything ended by process id.
#
# Needs a clone of this repository on a file system that all machines see, with .venv made by `make`. Submit from it:
#   sbatch clusters/slurm.sh search_spaces/digits.yaml /shared/runs/digits
# Submitted again it resumes the study, or says that it is done. `scancel --signal=TERM --batch JOB` saves and ends.
# Cost per hour: as your site accounts it; nodes x GPUs, from the start to the end of the job (unverified).
# Dashboard: `ssh -J LOGIN -L 8265:127.0.0.1:8265 HEAD`; the head and the token's file stand in the job's log.
# MLflow: mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:////shared/runs/digits/mlflow.db
#
#SBATCH --job-name=cadis-ray
#SBATCH --nodes=2
#SBATCH --time=12:00:00
# One Ray node a machine, which takes all that Slurm gives it.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
# Ray listens on ports of the machine; nobody else's processes should share it.
#SBATCH --exclusive
# Two minutes before the time is up this script, not its steps, gets SIGTERM: time to save.
#SBATCH --signal=B:TERM@120
# A machine that fails takes the job down; queued again, it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# What is written below is for this user only.
umask 077

study=${1:?usage: sbatch clusters/slurm.sh STUDY.yaml RUN_FOLDER}
out=${2:?usage: sbatch clusters/slurm.sh STUDY.yaml RUN_FOLDER}
bin=$SLURM_SUBMIT_DIR/.venv/bin

# A Ray or a Python other than the lock's must not start.
"$bin/python" -c 'import ray, sys; found = ray.__version__, sys.version_info[:2];
sys.exit(found != ("2.60.0", (3, 11)) and f"found {found}")'

RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token_$SLURM_JOB_ID
# Each pid is that of an srun, which passes SIGTERM on to its `ray start --block`; that ends its node and no other Ray.
nodes=() driver=
end() {
    trap - EXIT TERM INT
    for pid in $driver "${nodes[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap end EXIT
# Until there is a driver there is nothing to save.
trap 'exit 143' TERM INT

# A token of this job's own, in a file that every machine sees; only its path is ever passed on.
mkdir -p "$HOME/.ray"
"$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export RAY_AUTH_TOKEN_PATH
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# srun does not inherit it since Slurm 22.05.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The head's address is explicit: a Ray found by itself could be another job's. So is the port, which follows the job.
# awk reads to the end: a reader that stops early would now and then kill the writer and, with pipefail, this script.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
ip=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
# A folder of this job's own: /tmp/ray may belong to somebody else. Short, since sockets' paths hold 107 characters.
scratch=/tmp/ray_$SLURM_JOB_ID
echo "head $head ($ip:$port), token in $RAY_AUTH_TOKEN_PATH"

common=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$scratch" --block)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
    "$bin/ray" start --head --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1 \
    --dashboard-port=8265 "${common[@]}" &
nodes+=($!)
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        "$bin/ray" start --address="$ip:$port" "${common[@]}" &
    nodes+=($!)
fi

# A study plans with the nodes that it sees, so all of them first. In the background, since bash acts on a signal only
# where it waits.
"$bin/python" - "$ip:$port" "$SLURM_JOB_NUM_NODES" << 'PYTHON' &
import socket, sys, time
import ray

address, wanted = sys.argv[1], int(sys.argv[2])
ip, port = address.split(":")
deadline = time.monotonic() + 300
while True:
    try:
        socket.create_connection((ip, int(port)), timeout=5).close()
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"no Ray head at {address} after 5 minutes: {error}")
        time.sleep(2)
ray.init(address, log_to_driver=False)
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"{alive} of {wanted} nodes joined after 5 minutes")
    time.sleep(2)
PYTHON
driver=$!
wait "$driver"

"$bin/python" -m cadis_ray.tune "$study" --address "$ip:$port" --out "$out" &
driver=$!
stopping=0
trap 'stopping=1; kill -TERM "$driver" 2> /dev/null || true' TERM INT
code=0
wait "$driver" || code=$?
if ((stopping)); then
    # The signal ended that wait, not the study, which is saving now. (127: it had ended before.)
    again=0
    wait "$driver" || again=$?
    ((again == 127)) || code=$again
fi
driver=
exit "$code"
