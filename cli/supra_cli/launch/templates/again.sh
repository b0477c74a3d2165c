newest_checkpoint() {
  local found=("$run"/checkpoints/step_*)
  echo "${found[-1]}"
}

# Waits for what went to the background last, through signals; its exit code.
attend() {
  local code
  while true; do
    wait "$!"
    code=$?
    kill -0 "$!" 2> /dev/null || return "$code"
  done
}

# A start goes on after the newest checkpoint. torchrun hides how its processes ended, so the run's
# folder tells whether one was of use. Two in a row that were not are bad input or a broken node,
# which a third would not mend.
failures=0
while [[ $failures -lt 2 ]]; do
  if [[ -e $run/summary.json && -d $run/model ]]; then
    exec supra "${uptrain[@]}" # Ends with 0, or with 2 where these settings are not the run's.
  fi
  before=$(newest_checkpoint)
  start &
  attend && exit 0
  if [[ $(newest_checkpoint) != "$before" ]]; then
    failures=0
  elif [[ -z $ending ]]; then
    failures=$((failures + decides))
  fi
  [[ -z $ending ]] || leave
  sleep 10 &
  attend
  [[ -z $ending ]] || leave
done
echo "two starts in a row made no checkpoint: mend what stopped them, then submit it again" >&2
exit 2
