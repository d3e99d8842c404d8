#!/usr/bin/env bash
# Sends the commit that is checked out to all workers, into ~/clip_jax, and installs it there in
# a virtual environment. Run it again after each commit; the second time is quick.
#
#   setup.sh --name=clip --zone=us-west4-a

set -euo pipefail
# shellcheck source=tpu_scripts/tpu.sh
. "$(dirname "$0")/tpu.sh"
parse_options "" "" "$@"

cd "$(dirname "$0")/.."
archive=$(git rev-parse --git-path clip_jax.tar.gz)
say "sending $(git log -1 --format='%h %s')"
if [[ $(git status --porcelain) ]]; then
  say "warning: uncommitted changes are not sent; if the run needs them, commit them first"
fi

run cd "$PWD"  # for whoever pastes the dry run
run git archive --format=tar.gz --output="$archive" HEAD
tpu tpu-vm scp "$archive" "$name:clip_jax.tar.gz" --worker=all
ssh_worker all "mkdir -p clip_jax && tar -xzf clip_jax.tar.gz -C clip_jax tpu_scripts && \
bash clip_jax/tpu_scripts/worker.sh setup"
say "$name is set up"
