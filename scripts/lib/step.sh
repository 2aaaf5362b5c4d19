# shellcheck shell=bash
# Steps of a test script: run, counted, with a log each. Sourced by scripts/test and scripts/gpu-test, which set `logs`, the folder of
# the logs, and `only`, the words of the command line. Knows nothing of the steps.
passed=0 failed=0 skipped=0 failures=() lane='' lane_names=()
STEP_SECONDS=${STEP_SECONDS:-900}

# wanted NAME: whether the words of the command line, if any, select it
wanted() {
  local word
  [ ${#only[@]} -gt 0 ] || return 0
  for word in "${only[@]}"; do [[ $1 == *$word* ]] && return 0; done
  return 1
}

log_of() { echo "$logs/${1//[^A-Za-z0-9]/_}.log"; }

# measured NAME LIMIT COMMAND...: runs it for LIMIT seconds at most. The output goes to its log; `status seconds user system` to a file
# beside it. Exported functions are commands.
measured() {
  local log limit=$2 start=$SECONDS status=0 TIMEFORMAT='%U %S'
  log=$(log_of "$1")
  shift 2
  { time timeout "$limit" bash -c '"$@"' _ "$@" >"$log" 2>&1; } 2>"$log.cpu" || status=$?
  echo "$status $((SECONDS - start)) $(tail -1 "$log.cpu")" >"$log.outcome"
}

# step NAME [-t SECONDS] COMMAND...: runs it and counts it. Exit status 77 means skipped.
step() {
  local name=$1 limit=$STEP_SECONDS
  shift
  if [ "$1" = -t ]; then
    limit=$2
    shift 2
  fi
  wanted "$name" || return 0
  measured "$name" "$limit" "$@"
  report "$name"
}

# prepare NAME COMMAND...: makes what the steps use, whichever of them are selected: with what an earlier run left they would test another
# revision. Its failure ends the script. It counts as passed if it is selected itself.
prepare() {
  measured "$1" "$STEP_SECONDS" "${@:2}"
  report "$1"
  [ $failed = 0 ] || { conclude; exit 1; }
  wanted "$1" || passed=$((passed - 1))
}

# beside NAME COMMAND...: as step, but in the background of later steps and at lower CPU priority: one after another, in the order given.
# `join` waits for all of them and counts them.
beside() {
  local name=$1 before=$lane
  shift
  wanted "$name" || return 0
  {
    [ -z "$before" ] || tail --pid="$before" -f /dev/null
    renice -n 5 "$BASHPID" >/dev/null
    measured "$name" $((2 * STEP_SECONDS)) "$@"
  } &
  lane=$!
  lane_names+=("$name")
}

join() {
  local name
  wait
  for name in "${lane_names[@]}"; do report "$name"; done
  lane='' lane_names=()
}

# report NAME: counts the result of `measured` and prints a line
report() {
  local log status=1 seconds=0 user=0 system=0
  log=$(log_of "$1")
  read -r status seconds user system <"$log.outcome"
  case $status in
    0)
      passed=$((passed + 1))
      printf 'ok       %s (%s s, %.0f s of CPU)%s\n' "$1" "$seconds" "$(awk "BEGIN {print $user + $system}")" "$(counted "$log")"
      ;;
    77) skip "$1" "$(grep -a SKIPPED "$log" | head -1 | sed 's/^SKIPPED[: ]*//')" ;;
    *) fail "$1" "status $status after $seconds s, end of $log:" "$log" ;;
  esac
  # Skipped tests inside a step are listed too, by reason and number.
  [ "$status" = 77 ] || sed -nE 's/^ *SKIPPED:? +([a-z0-9]+_[a-z0-9_]+ )?/SKIPPED inside: /p' "$log" | sort | uniq -c
}

# The tests that a log counts, of cargo test, nextest, CTest and the Python programs.
counted() {
  grep -aE '^test result|tests run:|tests passed|passed, [0-9]+ failed' "$1" |
    awk '{for (i = 1; i < NF; i++) if ($(i + 1) ~ /^passed/) n += $i} END {if (n) printf ", %d tests", n}'
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
  # The error may be far above the end of the log, and the lines of a panic say more than a test's name.
  while IFS= read -r line; do failures+=("  $line"); done < <(
    grep -aE -m 6 '^ *(FAIL|failed:|error)|FAILED$' "$3" | cut -c 1-300
    grep -aE -A 5 -m 3 'panicked at' "$3" | cut -c 1-1500
  )
}

# The counts, and the exit status of the script.
conclude() {
  join
  echo
  [ $failed = 0 ] || printf 'failed: %s\n' "${failures[@]}"
  echo "$passed passed, $failed failed, $skipped skipped"
  [ $failed = 0 ] && [ $passed -gt 0 ]
}
