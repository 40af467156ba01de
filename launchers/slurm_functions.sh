# What the batch script of a job asks Slurm; slurm_script.py has each job read it from its snapshot of the code.

# The job as Slurm sees it now, in one line; nothing where the controller stays silent, being busy or replaced.
job_now() {
  local s
  for s in 1 2 4 8 0; do
    scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null && return
    sleep $s
  done
}

# Set `by_slurm`, an option of attempts.py, and `again`, which is empty where it is not for this script to start the job
# again. With a PreemptTime it got TERM and leaves within its grace, which to Slurm is a job that ended by itself.
who_ended() {
  by_slurm= again=yes
  case "$(job_now)" in
    *" JobState=RUNNING "*" PreemptTime="[0-9]*) by_slurm=--preempted ;;
    ""|*" JobState=RUNNING "*) ;;
    *" Reason=TimeLimit "*) again= ;;  # at_the_end has done it
    *) again= by_slurm=--ended-by-slurm ;;
  esac
}

# Put the job back into the queue; 1 where it cannot be, or has been cancelled meanwhile. As long as the controller is
# silent nobody else gets these nodes either; where it answers, a third refusal is its last word.
start_again() {
  local i refused=0
  command -v scontrol >/dev/null || return 1
  for i in $(seq 60); do
    scontrol requeue "$SLURM_JOB_ID" && return
    sleep $(( i < 12 ? 5 * i : 60 ))
    case "$(job_now)" in
      "") ;;
      *" JobState=RUNNING "*) refused=$((refused + 1)); [ $refused -lt 3 ] || return 1 ;;
      *) return 1 ;;
    esac
  done
  return 1
}

# In the background of the ranks: where saving takes longer than the time limit leaves them, Slurm kills srun and the
# script together, and what stands behind srun is not reached.
guard_time_limit() {
  trap 'at_the_end; kill $!; exit' TERM
  while :; do sleep 60 >/dev/null 2>&1 & wait $!; done
}

at_the_end() {
  local s
  case "$(job_now)" in *" Reason=TimeLimit "*)
    for s in 1 2 4 8; do scontrol requeue "$SLURM_JOB_ID" && break; sleep $s; done ;;
  esac
}

# An order to end a step that a node was slow to answer comes again a minute later, by job and step number alone.
# Without empty steps ahead of them the ranks of this start would have the number of those before, and end of it.
take_another_step_number() {
  local i
  for i in $(seq $(( ${SLURM_RESTART_COUNT:-0} % 4 ))); do
    timeout 60 srun --overlap --nodes=1 --ntasks=1 --job-name=number true >/dev/null 2>&1
  done
}
