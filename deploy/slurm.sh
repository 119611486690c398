#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster:
#     OUT=/shared/runs/a sbatch deploy/slurm.sh --config configs/imagenet.yaml --data.root /data/imagenet
# The arguments go to train/main.py. The job requeues itself until the run has finished, each time
# continuing the run in $OUT. Lines to change are marked CHANGE. PYTHON: another Python than
# .venv/bin/python; RANKS_PER_NODE=2 rehearses on nodes without GPUs.
#
#SBATCH --job-name=twinturbo
#SBATCH --nodes=4                   # CHANGE
#SBATCH --gpus-per-node=8           # CHANGE
#SBATCH --cpus-per-task=64          # CHANGE: all cores of a node; its ranks share them to decode
#SBATCH --mem=0                     # all memory of a node
#SBATCH --time=24:00:00             # CHANGE: at most what the partition allows, not what a run takes
#SBATCH --ntasks-per-node=1         # one launcher a node: it starts a process per GPU
#SBATCH --requeue                   # a node that fails requeues the job, too
#SBATCH --open-mode=append          # one log over all requeues
#SBATCH --output=slurm-%j.log
# CHANGE: seconds before the time limit at which the ranks get the signal to save and stop: three times
# what "checkpoint" lines in log.txt take, at least 60. SLURM may be a minute early. At preemption
# SLURM signals the ranks, and kills them after the partition's GraceTime: ask for one that long.
#SBATCH --signal=B:USR1@180
set -euo pipefail

: "${OUT:?set OUT to the run folder, on storage that all nodes see}"
cd "${SLURM_SUBMIT_DIR:-.}" # CHANGE: where the repository is
# CHANGE: the Python of the environment. In a container (pyxis): python=python3, and after srun
#     --container-image=twinturbo.sqsh --container-workdir=/opt/twinturbo \
#     --container-mounts=/data:/data:ro,/shared/runs:/shared/runs
python=${PYTHON:-.venv/bin/python}

# NCCL raises the soft limit too late for the sockets of many ranks
# (github.com/goodfire-ai/spd, pull request 957).
ulimit -n "$(ulimit -Hn)"
# No NCCL_ variable is set: the defaults are right unless the host has a network that ranks must not
# use. Then name the right one, for gloo too:
#     export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# Source: docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html and
# docs.pytorch.org/docs/stable/distributed.html, common environment variables.

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # so that two jobs on a node take different ports
mkdir -p "$OUT"
touch "$OUT/.slurm-start"

# Not through srun: on SIGTERM it sends its tasks SIGKILL (SLURM, src/srun/signals.c,
# _forward_signal).
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

# Each rank's log: $OUT/logs/HOST/JOB_.../attempt_N/RANK_ON_HOST/{stdout,stderr}.log; all of them,
# each line with its rank: slurm-JOB.log.
# --kill-on-bad-exit=0 --wait=0: a launcher that exits must not end those that wait for it.
# --cpus-per-task: srun does not take it from sbatch (SLURM 22.05 and newer).
# shellcheck disable=SC2016 # the hosts expand what is in single quotes
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 bash -c '
    exec "$1" train/launch.py --nnodes "$SLURM_NNODES" --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
        --rdzv-endpoint "$2" --rdzv-id "$SLURM_JOB_ID" \
        --log-dir "$3/logs/$(hostname)" --tee 3 train/main.py --out "$3" "${@:4}"' \
    launch "$python" "${hosts[0]}:$port" "$OUT" "$@" &
step=$!

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended wait, not the step
    code=0
    wait "$step" || code=$?
done

# torchrun exits with 1 after a clean stop too, so status.json decides. A file older than this start
# is of an earlier one: this start failed before it could write.
if [[ $OUT/status.json -nt $OUT/.slurm-start ]] && grep -q '"state": "preempted"' "$OUT/status.json"; then
    echo "stopped and saved: requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" # ends this script
fi
exit "$code"
