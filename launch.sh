#!/usr/bin/env bash
# The project's commands by name. Makes its own environment (.venv) on first use; set CXRDIST_PYTHON to use another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
usage: ./launch.sh COMMAND [ARGUMENTS]
  demo                 all steps on synthetic X-rays, two processes, no GPU needed; ends with a report
  test [--all] [PYTEST ARGS]       the tests; --all adds faults and slow ones
  setup [dev]          make the environment (every command does it when it is missing); dev adds the test tools
  check | format       format, lint, types and fast tests | rewrite the formatting
  gpu-check [ARGS]     first on a rented machine: tests, memory, speeds, a resume; ends with the flags to use
  fuzz | soak [ARGS]   mutated inputs | random SIGKILLs of every kind of run, resumed and compared
  COMMAND [ARGS]       whatever else `cxrdist --help` lists: preprocess, train, infer, evaluate, predict, doctor, ...
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

is_new_enough() { command "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }

find_python() { # prints the first Python from 3.11 on; 3.11 is preferred, because lock.txt is for it
  local name found=
  for name in python3.11 python3.12 python3.13 python3.14 python3; do
    if is_new_enough "$name"; then
      echo "$name"
      return
    fi
    found+=$("$name" --version 2> /dev/null | sed -n "s/^Python [0-9.]*$/; $name is &/p") || true
  done
  fail "Python 3.11 or newer is needed$found; install python3.11 with venv and pip, or name one in CXRDIST_PYTHON"
}

# pip takes a package of which half the files were written for installed: what was cut off there is made from scratch.
is_cut_off() { [ -n "$(find .venv/lib/*/site-packages -maxdepth 0 -newer .venv/.cxrdist-begun 2> /dev/null)" ]; }

is_installed() { # WHAT CHECKSUM
  [ "$(cat ".venv/.cxrdist-$1" 2> /dev/null)" = "$2" ] && [ -x .venv/bin/python ] && ! is_cut_off
}

install() { # WHAT CHECKSUM: the stamps are written last, so whatever fails before, the next command tries again
  local what=$1 want=$2 begun=.venv/.cxrdist-begun extras='' quiet=--quiet python
  python=$(find_python) || exit 2
  if is_cut_off || { [ -e .venv/bin ] && ! is_new_enough .venv/bin/python; }; then
    echo "an earlier set-up was cut off, or the Python of .venv is gone or too old: making .venv from scratch"
    rm -rf .venv/bin .venv/lib .venv/lib64 .venv/.cxrdist-core .venv/.cxrdist-dev
  fi
  if [ ! -e .venv/bin ]; then
    touch "$begun"
    "$python" -m venv .venv || fail "$python -m venv failed, see above; on Debian and Ubuntu: apt install $python-venv"
  fi
  touch "$begun"
  echo "installing into .venv with $(.venv/bin/python --version) (a few minutes, once)"
  [ "$what" = core ] || extras='[dev,dicom,onnx,app,s3,trackio]'
  [ ! -t 1 ] || quiet=
  if ! .venv/bin/python -m pip install $quiet --constraint constraints.txt --editable ".$extras"; then
    is_cut_off || rm -f "$begun" # nothing was touched: what worked before still does
    fail "pip failed, see above; when its cause (network, disk) is mended, run this again: there is nothing to delete"
  fi
  rm -f "$begun"
  [ "$what" = core ] || echo "$want" > .venv/.cxrdist-dev
  echo "$want" > .venv/.cxrdist-core
}

setup() { # core, or dev: also the tools and the extras that the tests need
  if [ -n "${CXRDIST_PYTHON:-}" ]; then
    is_new_enough "$CXRDIST_PYTHON" || fail "CXRDIST_PYTHON: '$CXRDIST_PYTHON' is not a Python of 3.11 or newer"
    return
  fi
  local want
  want=$({ pwd && cat pyproject.toml constraints.txt; } | cksum)
  ! is_installed "$1" "$want" || return 0
  mkdir -p .venv
  { # one set-up at a time: a pip that outlives a killed launch.sh still holds the lock
    if command -v flock > /dev/null; then
      flock --nonblock 9 || { echo "waiting for another set-up in this folder" && flock 9; }
    fi
    is_installed "$1" "$want" || install "$1" "$want"
  } 9> .venv/.cxrdist-lock
}

python() { "${CXRDIST_PYTHON:-.venv/bin/python}" "$@"; }

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in # `setup X && ...` would switch off `set -e` inside setup
  setup)
    case "${1:-core}" in core | dev) ;; *) fail "./launch.sh setup [dev], not '$1'" ;; esac
    setup "${1:-core}"
    [ -n "${CXRDIST_PYTHON:-}" ] || echo 'ready; to use the environment in this shell: source .venv/bin/activate'
    ;;
  gpu-check)
    setup dev
    python -m cxrdist bench gpu --json gpu_check.json "$@"
    ;;
  format)
    setup dev
    python -m ruff format .
    python -m ruff check --fix .
    ;;
  check)
    setup dev
    python -m ruff format --check .
    python -m ruff check .
    python -m mypy
    python -m pytest -q -n 2 --dist loadfile -m "fast and not slow and not fault"
    ;;
  test)
    setup dev
    if [ "${1:-}" = --all ]; then
      shift
      python -m pytest -n 2 --dist loadfile "$@"
    else
      python -m pytest -n 2 --dist loadfile -m "not slow and not fault" "$@"
    fi
    ;;
  fuzz | soak)
    setup dev
    python -m "tests.$command" "$@"
    ;;
  '' | -h | --help | help) usage ;;
  *)
    setup core
    python -m cxrdist "$command" "$@"
    ;;
esac
