#!/usr/bin/env bash
# Runs on each worker, in ~/clip_jax; setup.sh and train.sh call it over ssh:
# worker.sh setup | start ARGUMENTS | watch | stop
# gcloud repeats a command whose connection broke, so each can be called twice without harm.

set -euo pipefail
cd "$(dirname "$0")/.."
python=3.12  # newer than the runtimes' own

die() { echo "error: $HOSTNAME: $*" >&2; exit 1; }

# train.pid: the shell around train.py; train.status: what train.py ended with.
running() { [[ -e train.pid && ! -e train.status ]] && kill -0 "$(<train.pid)" 2>/dev/null; }

setup() {
  ! running || die "a run is going on: train.sh --stop, or wait for its end"
  rm -rf clip_jax configs  # a file that the commit no longer has must not stay
  tar -xzf ../clip_jax.tar.gz
  if [[ ! -x .venv/bin/pip ]]; then
    rm -rf .venv
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python "$python" .venv
  fi
  .venv/bin/pip install --quiet -e '.[tpu]'
}

start() {
  ! running || die "a run is going on: train.sh --watch or --stop"
  [[ -x .venv/bin/python ]] || die "not set up: run setup.sh first"
  # JAX asks for it: the TPU's runtime starts and stops faster. Lasts until the worker's next boot.
  sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' ||
    echo "warning: $HOSTNAME: no huge pages; the TPU will be slow to start" >&2
  if [[ -e train.log ]]; then mv train.log train.log.1; fi
  rm -rf train.status train.stopping
  trap '' HUP  # the run outlives the connection
  (
    status=0
    .venv/bin/python -u train.py "$@" || status=$?
    echo "$status" >train.status
  ) >train.log 2>&1 </dev/null &
  echo $! >train.pid
}

watch() {
  [[ -e train.pid ]] || die "no run was started here"
  tail --pid="$(<train.pid)" -n 200 -F train.log
  [[ -e train.status ]] || die "train.py was killed together with its shell"
  echo "train.py ended with status $(<train.status)" >&2
  exit "$(<train.status)"
}

stop() {
  if ! running; then echo "$HOSTNAME: nothing runs"; return; fi
  # mkdir succeeds once only: a second SIGTERM would kill train.py while it saves.
  if mkdir train.stopping 2>/dev/null; then
    pkill -TERM -P "$(<train.pid)" || rmdir train.stopping
  fi
  timeout 600 tail --pid="$(<train.pid)" -f /dev/null ||
    die "train.py has not ended 10 minutes after SIGTERM"
}

"$@"
