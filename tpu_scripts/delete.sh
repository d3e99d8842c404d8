#!/usr/bin/env bash
# Deletes the TPU: the queued resource and its node, in whatever state. What is on the workers'
# disks is lost; the workdir on gs:// stays.
#
#   delete.sh --name=clip --zone=us-west4-a [--yes]
#
#   --yes   do not ask

set -euo pipefail
# shellcheck source=tpu_scripts/tpu.sh
. "$(dirname "$0")/tpu.sh"
parse_options "" "yes" "$@"

state=$(tpu_state)
if [[ ! $dry_run ]]; then
  if [[ ! $state ]]; then say "$name does not exist in $zone"; exit; fi
  if [[ ! $yes ]]; then
    say "delete $name ($state) and all that is on its workers' disks? [y/N]"
    read -r answer || answer=''
    [[ $answer == [yY]* ]] || die "not deleted: answer y, or pass --yes"
  fi
fi
tpu queued-resources delete "$name" --force --quiet
