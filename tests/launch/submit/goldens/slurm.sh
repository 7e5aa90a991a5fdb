#!/bin/bash
#SBATCH --job-name=a-b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=/dev/null
#SBATCH --requeue

# SIGTERM is for the processes, which save; this shell waits for them.
trap : TERM
export NCCL_DEBUG=WARN
log='/runs/a b/logs/log.txt'
words=(python -m espalier.launch.train '--gin.MODEL_DIR='"'"'/runs/a b'"'"'')
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
# Without a log, the first place that can be written gets the reason.
lost() {
  for place in "$SLURM_SUBMIT_DIR" "$HOME" /tmp; do
    { echo "error: job $id on $(hostname): $1" >>"$place/slurm-$id.out"; } 2>/dev/null && break
  done
  end 2 2>/dev/null
}
end() {
  printf '{"id": "%s", "status": %d, "seconds": %d}\n' "$id" "$1" "$SECONDS" >"$log.ended.new"
  mv -- "$log.ended.new" "$log.ended"
  exit "$1"
}
word=$(cd /home/me/espalier 2>&1 && mkdir -p -- "$(dirname -- "$log")" 2>&1 && { : >>"$log"; } 2>&1) || lost "$word"
cd /home/me/espalier
exec >>"$log" 2>&1
SECONDS=$(cat -- "$log.seconds" 2>/dev/null)  # of earlier starts of this job
WANDB_API_KEY=$(cat -- /home/me/.wandb) && export WANDB_API_KEY || end 2
srun --kill-on-bad-exit=0 --cpus-per-task=8 bash -c 'log=$1; shift; [ "$SLURM_PROCID" = 0 ] || log=$log.task$SLURM_PROCID; exec "$@" >>"$log" 2>&1' bash "$log" "${words[@]}"
status=$?

# 75: start again, as after 143, a SIGTERM before the run could handle it. Other statuses need a person.
if [[ $status = 75 || $status = 143 ]] && [ ! -e "$log.cancelled" ]; then
  # After `scancel`, or a preemption without grace, after which SLURM itself queues the job again.
  [ "$(squeue -h -j "$id" -o %T)" != COMPLETING ] || { echo "cancelled or preempted by SLURM"; exit 75; }
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    echo "$SECONDS" >"$log.seconds"; scontrol requeue "$id" && exit 75
  else
    echo "error: status $status after 100 requeues, the limit (requeues): submit again to go on."
  fi
fi
end "$status"
