# shellcheck shell=bash
# How the jobs run a stage of entrypoint.py: with the settings in $SETTINGS, by what $RUN_BY says.

# stage NAME OPTION...: in a subshell of the caller's, which becomes the stage. One that waited for it
# would end by a signal to the group before the stage does, and the job with it.
stage() {
  local mounts=$PROJECT${MOUNTS:+,$MOUNTS}
  case $RUN_BY in
    venv) exec "$PROJECT/.venv/bin/python" "$PROJECT/entrypoint.py" --env-file "$SETTINGS" "$@" ;;
    apptainer) MOUNTS=$mounts exec "$PROJECT/cluster/apptainer/stage" "$SETTINGS" "$@" ;;
    pyxis)
      exec srun --ntasks=1 --container-image="$IMAGE" --container-mounts="$mounts" --container-readonly \
        /opt/venv/bin/python /app/entrypoint.py --env-file "$SETTINGS" "$@" ;;
  esac
}

# to_the_end COMMAND...: run the last thing that a job does. The shell gets Slurm's signals, and Slurm
# kills what is left when it ends: so it hands them on, and waits.
to_the_end() {
  local child status=0
  set -m # a group of its own: a signal reaches what runs in it, however deep
  "$@" &
  child=$!
  set +m
  trap 'kill -TERM -- "-$child" 2>/dev/null || true' TERM INT
  while true; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || return "$status"
  done
}
