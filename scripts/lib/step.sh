# Steps of a test script: run, counted, with a log each. Sourced by scripts/test and scripts/gpu-test, which set `logs`, the folder of
# the logs, and `only`, the words of the command line. Knows nothing of what the steps do.
passed=0 failed=0 skipped=0 failures=()
STEP_SECONDS=${STEP_SECONDS:-900}

# wanted NAME: whether the words of the command line, if any, choose it
wanted() {
  local word
  [ ${#only[@]} -gt 0 ] || return 0
  for word in "${only[@]}"; do [[ $1 == *$word* ]] && return 0; done
  return 1
}

# Tests that a log counts, where it does.
counted() { grep -aE '^test result|tests passed|passed, [0-9]+ failed' "$1" | awk '{for(i=1;i<NF;i++) if ($(i+1) ~ /^passed/) n+=$i} END {if (n) printf ", %d tests", n}'; }

# measured NAME SECONDS COMMAND...: runs it with its output in its log, for SECONDS at most. What it took of the processors, as
# `user system` in seconds, is left beside the log.
measured() {
  local log limit=$2 TIMEFORMAT='%U %S'
  log=$(log_of "$1")
  shift 2
  { time timeout "$limit" bash -c '"$@"' _ "$@" >"$log" 2>&1; } 2>"$log.cpu"
}

# step NAME [-t SECONDS] COMMAND...: runs it, keeps its output, counts it. Exit status 77 means skipped. Exported functions are commands.
step() {
  local name=$1 limit=$STEP_SECONDS start=$SECONDS
  shift
  if [ "$1" = -t ]; then
    limit=$2
    shift 2
  fi
  wanted "$name" || return 0
  measured "$name" "$limit" "$@"
  report "$name" $? $((SECONDS - start))
}

# beside LANE NICENESS NAME COMMAND...: as step, but beside the steps that follow. What is in one lane runs in order, one at a time; a
# lane that does not exist yet starts now. `conclude` waits for all and counts them.
declare -A lane_pid=()
beside_names=()
beside() {
  local lane=$1 nice=$2 name=$3 log before=${lane_pid[$1]:-}
  shift 3
  wanted "$name" || return 0
  log=$(log_of "$name")
  rm -f "$log.outcome"
  (
    [ -z "$before" ] || tail --pid="$before" -f /dev/null
    start=$SECONDS
    # What is nice gets little of a busy machine.
    renice -n "$nice" "$BASHPID" >/dev/null
    measured "$name" $((2 * STEP_SECONDS)) "$@"
    echo "$? $((SECONDS - start))" >"$log.outcome"
  ) &
  lane_pid[$lane]=$!
  beside_names+=("$name")
}

# join LANE: waits until all of a lane has run
join() { [ -z "${lane_pid[$1]:-}" ] || tail --pid="${lane_pid[$1]}" -f /dev/null; }

log_of() { echo "$logs/${1//[^A-Za-z0-9]/_}.log"; }

# Seconds of the processors that the step of a log took.
processor() { awk '{printf "%.0f", $1 + $2}' "$1.cpu" 2>/dev/null; }

# report NAME STATUS SECONDS
report() {
  local name=$1 rc=$2 log
  log=$(log_of "$name")
  case $rc in
    0) passed=$((passed + 1)); echo "ok       $name ($3 s, $(processor "$log") s of CPU)$(counted "$log")" ;;
    77) skip "$name" "$(grep -a SKIPPED "$log" | head -1 | sed 's/^SKIPPED[: ]*//')" ;;
    *) fail "$name" "status $rc after $3 s, end of $log:" "$log" ;;
  esac
  # A test inside a step that was skipped shows here too.
  [ "$rc" = 77 ] || grep -a '^SKIPPED' "$log" | sed "s/^/         $name: /"
}

# skip NAME WHY
skip() {
  skipped=$((skipped + 1))
  echo "SKIPPED  $1: $2"
}

# fail NAME WHY LOG
fail() {
  failed=$((failed + 1))
  failures+=("$1")
  echo "FAILED   $1 ($2)"
  tail -n 60 "$3"
  # What went wrong may stand far above the end, and what shows a run's output may show its last lines only.
  while IFS= read -r line; do failures+=("  $line"); done < <(grep -aE -A 4 -m 3 '^ *(FAIL|failed:|error)|FAILED$|panicked at' "$3" | cut -c 1-300 | head -n 12)
}

# The counts, and the exit status of the script.
conclude() {
  local name outcome
  wait
  for name in "${beside_names[@]}"; do
    read -ra outcome <"$(log_of "$name").outcome" || outcome=(1 0)
    report "$name" "${outcome[@]}"
  done
  echo
  [ $failed = 0 ] || printf 'failed: %s\n' "${failures[@]}"
  echo "$passed passed, $failed failed, $skipped skipped"
  [ $failed = 0 ] && [ $passed -gt 0 ]
}
