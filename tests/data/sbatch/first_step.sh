#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --job-name=s00-vs100-avcil-seed0-0a1b2c
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/vs100-avcil-seed0/jobs/step_000/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --wckey=submitit

# setup
pause=5
requeue() {
  if [ "${reason:-}" != "$1" ]; then  # the first of several calls
    echo "avcil: step 0 is not done ($1); requeued, it continues from its last snapshot"; reason=$1
  fi
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; exit 1; fi
}
not_done() {
  if [ -e /shared/runs/vs100-avcil-seed0/jobs/step_000.done ]; then exit 0; fi
  if [ -e /shared/runs/vs100-avcil-seed0/jobs/step_000.failed ]; then exit 2; fi
  cause="SLURM did not requeue the job"
  for _ in {1..120}; do
    case "$(scontrol show job -o "$SLURM_JOB_ID")" in
      *" JobState=RUNNING "*)
        if [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ]; then
          cause="max_requeues=10"; break
        fi
        requeue "$1" ;;
      *" JobState="*) exit 1 ;;
    esac
    sleep "$pause"
  done
  /shared/venv/bin/python -m launch.cluster.mark_failed /shared/runs/vs100-avcil-seed0/jobs 0 \
    "step 0 is not done after $((${SLURM_RESTART_COUNT:-0} + 1)) starts ($1; $cause); see its log"
  exit 1
}
trap : TERM USR2  # the ranks handle these signals; the shell waits for the ranks
export PYTHONSAFEPATH=1  # no modules of the working folder
late() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ]; then exit; fi
  export SLURM_TIME_FORMAT=standard
  while true; do
    left=$pause
    if end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e); then
      if [ -z "$end" ] || ! end=$(date --date="$end" +%s); then exit; fi
      left=$((end - 30 - $(date +%s)))
      if [ "$left" -le 0 ]; then
        requeue "the ranks do not react, and the time limit is near"
        left=$pause
      fi
    fi
    read -r -t "$left"  # a pause, which ends with the input
    if [ "$?" -le 128 ]; then exit; fi
  done
}
exec {waiting}> >(late)  # its input ends when this is closed, or with the script

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/vs100-avcil-seed0/jobs/step_000/%j_%t_log.out --export=ALL --cpus-per-task=1 --kill-on-bad-exit=1 --wait=3600 /shared/venv/bin/python -u -m launch.cluster.rank_main /shared/runs/vs100-avcil-seed0/jobs/step_000 0123abcd.pkl


# teardown
code=$?
exec {waiting}>&-
not_done "exit code $code"