#!/usr/bin/env bash
# The project's commands by name. Makes its own environment (.venv) on first use; set CXRDIST_PYTHON to use another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
usage: ./launch.sh COMMAND [ARGUMENTS]
  demo [--images DIR --csv FILE]   all steps on a small division: shards, two models, submission, report
  setup                            make the environment (every command does it when it is missing)
  test [--all] [PYTEST ARGS]       the tests; --all adds faults and slow ones
  check | format                   format, lint, types and fast tests | rewrite the formatting
  preprocess TASK [ARGS]           images -> shards; TASK is a, b or a .toml file
  train TASK [ARGS]                train on all GPUs of this machine (accel_configs/), e.g. --model chexfound
  infer TASK [ARGS]                test-time augmentation and averaging -> submission.csv
  doctor                           versions, GPUs, precision, disk, and what would be used
TEXT
}

setup() {
  [ -z "${CXRDIST_PYTHON:-}" ] || return 0
  local stamp=.venv/.cxrdist-installed want
  want=$(cat pyproject.toml constraints.txt | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
  local python
  python=$(command -v python3.11 || command -v python3 || true)
  [ -n "$python" ] || { echo "error: no python3.11 found; install Python 3.11 with venv and pip" >&2; exit 2; }
  echo "making .venv with $("$python" --version) (a few minutes, once)"
  "$python" -m venv .venv
  local quiet=--quiet
  [ ! -t 1 ] || quiet=
  .venv/bin/python -m pip install $quiet --constraint constraints.txt --editable '.[dev]'
  echo "$want" > "$stamp"
}

python() { "${CXRDIST_PYTHON:-.venv/bin/python}" "$@"; }

launch() { # MODULE TASK [ARGS]: accelerate with the YAML that fits this machine
  local module=$1 task=$2 plan config processes settings
  shift 2
  case "$task" in
    a | b | *.toml | *.json) ;;
    *) echo "error: task is a, b or a .toml file, not '$task'; e.g. ./launch.sh train b" >&2; exit 2 ;;
  esac
  plan=$(python -m cxrdist.doctor --plan)
  IFS=$'\t' read -r config processes settings <<< "$plan"
  [ -z "$settings" ] || export $settings
  python -m accelerate.commands.launch --quiet --config_file "$config" --num_processes "$processes" \
    -m "$module" --task "$task" --expect-processes "$processes" "$@"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
  setup) setup ;;
  demo) setup && python -m cxrdist.demo "$@" ;;
  doctor) setup && python -m cxrdist.doctor "$@" ;;
  preprocess) setup && task=${1:?"say which task: ./launch.sh preprocess b"} && shift && python -m cxrdist.preprocess --task "$task" "$@" ;;
  train | infer) setup && task=${1:?"say which task: ./launch.sh $command b"} && shift && launch "cxrdist.$command" "$task" "$@" ;;
  format) setup && python -m ruff format . && python -m ruff check --fix . ;;
  check)
    setup
    python -m ruff format --check .
    python -m ruff check .
    python -m mypy
    python -m pytest -q -m fast
    ;;
  test)
    setup
    if [ "${1:-}" = --all ]; then shift; python -m pytest "$@"; else python -m pytest -m "not slow and not fault" "$@"; fi
    ;;
  -h | --help | help) usage ;;
  *) usage >&2; exit 2 ;;
esac
