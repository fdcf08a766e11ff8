#!/usr/bin/env bash
# Trains on this machine: makes the environment if need be, then runs phpjax.main from the repository root.
#
#   bash launch/local.sh                                  PHP on the toybox, into runs/php_avqa_toybox
#   bash launch/local.sh --mode=dry_run                   arguments go to `python -m phpjax.main`
#   bash launch/local.sh --config=configs/finetune.py:toybox    workdir: runs/finetune_toybox
#
# Without --config it is configs/php_avqa.py:toybox; without --workdir it is runs/NAME_VARIANT of the config.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

config='' workdir='' next=''
for argument in "$@"; do
  [ "$next" != config ] || config=$argument
  next=''
  case $argument in
    --config=* | -config=*) config=${argument#*=} ;;
    --config | -config) next=config ;;
    --workdir | --workdir=* | -workdir | -workdir=*) workdir=given ;;
  esac
done
if [ -z "$workdir" ]; then
  name=$(basename "${config:-configs/php_avqa.py:toybox}")
  set -- --workdir="runs/$(printf '%s' "${name/.py/}" | tr ':' '_')" "$@"
fi
[ -n "$config" ] || set -- --config=configs/php_avqa.py:toybox "$@"

# A training step takes and returns a gigabyte of buffers; huge pages make that cheaper on CPU (Linux, glibc; numbers in README.md here).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

phpjax_install core
cd "$root"
exec "$python" -m phpjax.main "$@"
