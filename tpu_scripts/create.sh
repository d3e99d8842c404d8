#!/usr/bin/env bash
# Requests a TPU as a queued resource and waits until it is ACTIVE. Says so if it already is;
# waits on if it was requested before.
#
#   create.sh --name=clip --zone=us-west4-a --accelerator_type=v5litepod-256 [--spot]
#
#   --accelerator_type=TYPE     such as v5litepod-256, v5p-128, v6e-64, v4-32 (required)
#   --runtime_version=VERSION   default: by accelerator type
#   --spot                      cheaper, and may be taken away at any time
#   --timeout=MINUTES           to wait, default 60; the request stays in the queue after that

set -euo pipefail
# shellcheck source=tpu_scripts/tpu.sh
. "$(dirname "$0")/tpu.sh"
parse_options "accelerator_type runtime_version timeout" "spot" "$@"
[[ $accelerator_type ]] || usage_error "--accelerator_type=TYPE is missing, such as v5litepod-256"
[[ $timeout =~ ^[0-9]+$ ]] || usage_error "--timeout takes whole minutes, not '$timeout'"

if [[ ! $runtime_version ]]; then
  case $accelerator_type in
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
    *) usage_error "no runtime version is known for '$accelerator_type': pass --runtime_version," \
      "one of 'gcloud compute tpus tpu-vm versions list --zone=$zone'" ;;
  esac
fi

state=$(tpu_state)
if [[ ! $state ]]; then
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" ${spot:+--spot}
  state=$(tpu_state)
fi
if [[ $dry_run ]]; then exit; fi

for ((waited = 0; ; waited += 30)); do
  say "$name is ${state:-gone}"
  case $state in
    ACTIVE) exit ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) ;;
    *) die "$name will not become ACTIVE. The reason is in" \
      "'gcloud compute tpus queued-resources describe $name --zone=$zone';" \
      "remove it with delete.sh, then create it again" ;;
  esac
  ((waited < timeout * 60)) || die "$name is not ACTIVE after $timeout minutes and stays in the" \
    "queue: run this again to wait on, or delete.sh to give up"
  sleep 30
  state=$(tpu_state)
done
