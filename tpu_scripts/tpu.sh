# shellcheck shell=bash
# shellcheck disable=SC2034  # the options are read by the scripts that source this
#
# Options of every script, as --option=VALUE or --option VALUE:
#   --name=NAME          of the TPU: the queued resource and its one node (required)
#   --zone=ZONE          such as us-west4-a (required)
#   --project=PROJECT    default: gcloud's own
#   --dry_run            print the commands, ready to paste, and run nothing
#   --help               print this

name='' zone='' project='' accelerator_type='' runtime_version='' timeout=60
spot='' dry_run='' yes='' stop='' watch=''
rest=()    # what follows `--`
exec 3>&1  # where --dry_run prints, from within $(...) too

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }
usage_error() { say "error: $* (more: $0 --help)"; exit 2; }
header() { sed -n '/^# [[:upper:]]/,/^$/{/^$/q;s/^# \{0,1\}//p;}' "$1"; }

# parse_options "OPTIONS" "SWITCHES" "$@": a script's own, besides those of every script.
parse_options() {
  local options=" name zone project $1 " switches=" dry_run $2 " option value
  shift 2
  while (($#)); do
    option=${1#--} value=''
    case $1 in
      --help) header "$0"; echo; header "${BASH_SOURCE[0]}"; exit 0 ;;
      --)
        [[ $switches == *' -- '* ]] || usage_error "nothing may follow '--' here"
        shift; rest=("$@"); break ;;
      --*=*) value=${option#*=} option=${option%%=*} ;;
      --*)
        if [[ $switches == *" $option "* ]]; then printf -v "$option" yes; shift; continue; fi
        if (($# > 1)); then value=$2; shift; fi ;;
      *) usage_error "unexpected argument '$1'" ;;
    esac
    [[ $options == *" $option "* ]] || usage_error "unknown option '--$option'"
    [[ $value && $value != --* ]] || usage_error "--$option needs a value"
    printf -v "$option" %s "$value"
    shift
  done
  [[ $name ]] || usage_error "--name=NAME is missing: the TPU's name, yours to choose"
  [[ $zone ]] || usage_error "--zone=ZONE is missing: where you have TPU quota, such as us-west4-a"
  if [[ ! $dry_run ]] && ! command -v gcloud >/dev/null; then
    usage_error "gcloud is not on the PATH: install the Google Cloud CLI, then 'gcloud auth login'"
  fi
}

# Prints words as one line that every POSIX shell reads back as the same words.
quote() {
  local word line='' mark="'" escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$mark/$escaped}'" ;;
    esac
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() { if [[ $dry_run ]]; then quote "$@" >&3; else "$@"; fi; }

tpu() {
  local command=(gcloud compute tpus "$@" --zone="$zone")
  if [[ $project ]]; then command+=(--project="$project"); fi
  run "${command[@]}"
}

# The state of the queued resource, or nothing if there is none of that name. (`describe` would
# fail then, and could not be told from a gcloud that failed for another reason.)
tpu_state() {
  tpu queued-resources list --filter="name.basename()=$name" --format='value(state.state)'
}

# ssh_worker NUMBER|all COMMAND, which starts in the home directory.
ssh_worker() { tpu tpu-vm ssh "$name" --worker="$1" --command="$2"; }
