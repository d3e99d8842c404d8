#!/usr/bin/env bash
# Starts train.py on all workers and follows worker 0's log. The run outlives the connection:
# Ctrl-C only detaches. Ends with train.py's own exit status, if it is still attached then.
#
#   train.sh --name=clip --zone=us-west4-a -- --config=configs/vitb16.py --workdir=gs://bucket/run
#   train.sh --name=clip --zone=us-west4-a --watch
#   train.sh --name=clip --zone=us-west4-a --stop
#
#   -- ARGUMENTS   for train.py, which gets them as they are
#   --watch        follow the log of the run that is going on
#   --stop         send SIGTERM on all workers and wait: train.py saves a checkpoint and exits

set -euo pipefail
# shellcheck source=tpu_scripts/tpu.sh
. "$(dirname "$0")/tpu.sh"
parse_options "" "watch stop --" "$@"
worker='bash clip_jax/tpu_scripts/worker.sh'
if [[ $watch$stop ]]; then
  ((${#rest[@]} == 0)) || usage_error "--watch and --stop take no arguments for train.py"
else
  ((${#rest[@]})) || usage_error "train.py's arguments are missing: -- --config=..."
fi

if [[ $stop ]]; then ssh_worker all "$worker stop"; exit; fi

if [[ ! $watch ]]; then
  ssh_worker all "$worker start $(quote "${rest[@]}")" ||
    die "not all workers started: see above, then --stop those that did"
fi
if [[ ! $dry_run ]]; then
  say "following worker 0: Ctrl-C detaches, the run goes on (--watch: back to it, --stop: end it)"
  trap 'say "detached; the run goes on"; exit 130' INT
fi
ssh_worker 0 "$worker watch"
