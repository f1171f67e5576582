#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:4711
#SBATCH --exclude='gpu[03,07]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=s04-vs100-avcil-seed0-0a1b2c
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=492032MB
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/vs100-avcil-seed0/jobs/step_004/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
module load cuda/12
export NCCL_SOCKET_IFNAME="ib0"
trap : TERM USR2  # the ranks handle these signals; the shell waits for the ranks
export PYTHONSAFEPATH=1  # no modules of the working folder
export PYTHONPATH=/shared/runs/vs100-avcil-seed0/jobs/code-0123456789ab${PYTHONPATH:+:$PYTHONPATH}
again() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then return; fi
  echo "avcil: step 4 is not done ($1); requeued, it continues from its last snapshot"
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; exit 1; fi
}
late() {
  export SLURM_TIME_FORMAT=standard
  while end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && [ -n "$end" ] \
      && end=$(date --date="$end" +%s); do
    left=$((end - 75 - $(date +%s)))
    if [ "$left" -le 0 ]; then again "the ranks do not react, and the time limit is near"; exit; fi
    read -r -t "$left"  # a pause, which ends with the input
    if [ "$?" -le 128 ]; then exit; fi
  done
}
exec {waiting}> >(late)  # its input ends when this is closed, or with the script

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/vs100-avcil-seed0/jobs/step_004/%j_%t_log.out --export=ALL --cpus-per-task=12 --kill-on-bad-exit=1 --wait=3600 /shared/venv/bin/python -u -m launch.cluster.rank_main /shared/runs/vs100-avcil-seed0/jobs/step_004 0123abcd.pkl


# teardown
code=$?
exec {waiting}>&-
if [ -e /shared/runs/vs100-avcil-seed0/jobs/step_004.done ]; then exit 0; fi
if [ -e /shared/runs/vs100-avcil-seed0/jobs/step_004.failed ]; then exit 2; fi
if scontrol show job -o "$SLURM_JOB_ID" | grep -q " JobState=RUNNING "; then
  again "exit code $code"
  starts="$((${SLURM_RESTART_COUNT:-0} + 1)) starts (exit code $code); max_requeues=20"
  /shared/venv/bin/python -m launch.cluster.mark_failed /shared/runs/vs100-avcil-seed0/jobs 4 "step 4 is not done after $starts; see its log"
fi
exit 1