#!/bin/sh
# A gate for continuous integration: build a bundle, take it up the parity ladder, replay its vectors, and compare the
# report with a committed one. See README.md beside this file.
#
# Settings, all environment variables:
#   CHECKPOINT  folder with config.json and model.safetensors   (default: examples/demo/checkpoint)
#   TEXT        held-out UTF-8 text, or a .npy of token ids     (default: examples/demo/heldout.txt)
#   TARGETS     names of targets, separated by spaces           (default: ort-cpu-fp32 ort-cpu-int8)
#   BASELINE    report to compare with; empty: none             (default: baseline.json beside this file)
#   OUTPUT      folder for the bundle and the reports           (default: build/gate)
#   BUNDLE      check this bundle instead of building one       (default: none, CHECKPOINT is built)
#   LEVELS      levels of the ladder, separated by spaces       (default: all but long-run)
#   CRT_EXPORT  the command                                     (default: crt-export)
#
# Exit codes: 0 sound, 1 parity failed or a regression, 2 bad input, 3 environment, 70 a bug, 130 interrupted.
# Whatever it is, the reports that were made stay in OUTPUT.
set -eu

CHECKPOINT=${CHECKPOINT:-examples/demo/checkpoint}
TEXT=${TEXT:-examples/demo/heldout.txt}
TARGETS=${TARGETS:-ort-cpu-fp32 ort-cpu-int8}
BASELINE=${BASELINE-$(dirname "$0")/baseline.json}
OUTPUT=${OUTPUT:-build/gate}
BUNDLE=${BUNDLE:-}
LEVELS=${LEVELS:-}
CRT_EXPORT=${CRT_EXPORT:-crt-export}

verdict=0

finish() {
  if [ "$verdict" -eq 0 ]; then
    echo "gate: passed; report: $OUTPUT/report.html"
  else
    echo "gate: FAILED with exit code $verdict; what was written is in $OUTPUT" >&2
  fi
  exit "$verdict"
}

# A stage that says 1 (parity, regression) lets the next one run, so that the reports are complete; anything else ends it.
stage() {
  name=$1
  shift
  echo "gate: $name" >&2
  code=0
  "$@" || code=$?
  [ "$code" -eq 0 ] || echo "gate: $name: exit code $code" >&2
  [ "$verdict" -ne 0 ] || verdict=$code
  if [ "$code" -gt 1 ]; then
    verdict=$code
    finish
  fi
}

refuse() {
  echo "gate: $2" >&2
  verdict=$1
  finish
}

# shellcheck disable=SC2317  # called by stage
build() {
  code=0
  # shellcheck disable=SC2086  # CRT_EXPORT may be a command with arguments, such as "python -m crt_export"
  $CRT_EXPORT build "$CHECKPOINT" --output "$BUNDLE" "$@" --json >"$OUTPUT/build.json" || code=$?
  # A build that does not agree with PyTorch writes no bundle, but says what it found.
  if [ "$code" -eq 1 ]; then
    mv "$OUTPUT/build.json" "$OUTPUT/report.json"
    # shellcheck disable=SC2086
    $CRT_EXPORT report "$OUTPUT/report.json" --output "$OUTPUT/report.html" --junit "$OUTPUT/junit-validate.xml" || true
  else
    rm -f "$OUTPUT/build.json"
  fi
  return "$code"
}

# --- before minutes of work -------------------------------------------------------------------------------------------
command -v "${CRT_EXPORT%% *}" >/dev/null ||
  refuse 3 "CRT_EXPORT: ${CRT_EXPORT%% *}: no such command; pip install 'crt-export[export,cpu,report]'"
[ -n "$BUNDLE" ] || [ -d "$CHECKPOINT" ] || refuse 2 "CHECKPOINT: $CHECKPOINT: expected a folder, found none"
[ -z "$BUNDLE" ] || [ -d "$BUNDLE" ] || refuse 2 "BUNDLE: $BUNDLE: expected a folder, found none"
[ -f "$TEXT" ] || refuse 2 "TEXT: $TEXT: expected a file, found none"
[ -z "$BASELINE" ] || [ -f "$BASELINE" ] ||
  refuse 2 "BASELINE: $BASELINE: expected a report, found none (the report.json of a run with an empty BASELINE is one)"
mkdir -p "$OUTPUT" || refuse 2 "OUTPUT: $OUTPUT: cannot be made"
rm -f "$OUTPUT"/report.json "$OUTPUT"/report.html "$OUTPUT"/build.json "$OUTPUT"/junit-*.xml

case $TEXT in
*.npy) text=--tokens ;;
*) text=--text ;;
esac

# --- build, validate, replay, compare ---------------------------------------------------------------------------------
set --
for target in $TARGETS; do set -- "$@" --target "$target"; done
if [ -z "$BUNDLE" ]; then
  BUNDLE=$OUTPUT/bundle
  stage build build "$@" $text "$TEXT"
  [ "$verdict" -eq 0 ] || finish
fi

# shellcheck disable=SC2086
stage selftest $CRT_EXPORT selftest "$BUNDLE" "$@" --junit "$OUTPUT/junit-selftest.xml"
for level in $LEVELS; do set -- "$@" --level "$level"; done
# shellcheck disable=SC2086
stage validate $CRT_EXPORT validate "$BUNDLE" "$@" $text "$TEXT" \
  --report "$OUTPUT/report.json" --html "$OUTPUT/report.html" --junit "$OUTPUT/junit-validate.xml"
if [ -n "$BASELINE" ]; then
  # shellcheck disable=SC2086
  stage compare $CRT_EXPORT compare "$BASELINE" "$OUTPUT/report.json" --junit "$OUTPUT/junit-compare.xml"
fi
finish
