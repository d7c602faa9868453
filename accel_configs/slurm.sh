#!/usr/bin/env bash
# Several nodes under Slurm: one launcher a node, which starts one process a GPU. Run from the checkout, on a shared disk:
#   sbatch --nodes=2 accel_configs/slurm.sh train --task b
#   sbatch --nodes=2 accel_configs/slurm.sh train --task b --model chexfound --set global_batch_size=128
#   sbatch --nodes=1 accel_configs/slurm.sh infer --task b
#   sbatch --nodes=1 --array=0-4 accel_configs/slurm.sh folds --task b --model chexfound --folds 5     a fold a task
#   sbatch --nodes=1 --array=0-7 --gpus-per-node=0 accel_configs/slurm.sh preprocess --task b --data D     a node a task
# Tasks of preprocess share the work: they may start late, be preempted or fail, and the others finish.
# Before the time limit and on preemption, training writes a checkpoint, and preprocessing has its finished shards; the
# job is then queued again and continues.
#SBATCH --job-name=cxrdist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# Slurm runs a copy of this script from its spool folder; the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
entry=${1:?"say what to run: sbatch accel_configs/slurm.sh train --task b"}
shift
case "$entry" in
  train) set -- "$@" --resume ;; # a first start finds no checkpoint and begins
  infer) ;;
  folds) # starts accelerate itself, on its own node; finished and interrupted folds are known without a flag
    [ "$SLURM_NNODES" = 1 ] || { echo "error: a fold is trained on one node: sbatch --nodes=1 --array=0-4" >&2; exit 2; }
    ;;
  preprocess)
    [ "$SLURM_NNODES" = 1 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || {
      echo "error: a task of an array is one node: sbatch --nodes=1 --array=0-7" >&2; exit 2; }
    ;;
  *) echo "error: '$entry' is not train, infer, folds or preprocess" >&2; exit 2 ;;
esac

python=${CXRDIST_PYTHON:-.venv/bin/python}
# srun no longer takes this from sbatch (Slurm 22.05): without it a node's processes share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
if [ "$entry" != preprocess ]; then
  gpus=${CXRDIST_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?"no GPU in this job; ask for --gpus-per-node"}}
  export MASTER_NODE PROCESSES PORT CONFIG
  MASTER_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  PROCESSES=$((SLURM_NNODES * gpus))
  PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
  CONFIG=${CXRDIST_ACCEL_CONFIG:-accel_configs/nodes.yaml}
  if grep -q '^use_cpu: true' "$CONFIG"; then export ACCELERATE_USE_CPU=true; fi # accelerate forgets it between processes
fi

# The batch shell gets USR1 two minutes before the limit and TERM on preemption; both stop the launchers, whose processes
# then have 30 s to write their checkpoint.
stopped=
trap 'stopped=yes; kill -TERM "$job" 2> /dev/null || true' USR1 TERM

if [ "$entry" = folds ]; then
  srun --ntasks=1 "$python" -m cxrdist.folds "$@" &
elif [ "$entry" = preprocess ]; then
  srun --ntasks-per-node=1 --kill-on-bad-exit=0 "$python" -m cxrdist.preprocess "$@" & # a lost node ends no other
else
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    exec "$0" -m accelerate.commands.launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
      --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_NODE" --main_process_port "$PORT" \
      --num_processes "$PROCESSES" -m "$@" --expect-processes "$PROCESSES"' "$python" "cxrdist.$entry" "$@" &
fi
job=$!
code=0
wait "$job" || code=$?
while kill -0 "$job" 2> /dev/null; do # a signal ends wait early: srun is still stopping
  code=0
  wait "$job" || code=$?
done

if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
  echo "stopped by Slurm; what is written counts: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
