#!/usr/bin/env bash
# Train on a slice of Cloud TPU VMs without Kubernetes:
#
#   export PROJECT=... ZONE=us-west4-a IMAGE=REGISTRY/shampax:tpu SHARE=10.0.0.2:/runs
#   ./tpu_vm.sh create
#   ./tpu_vm.sh train --config=shampax/configs/lm.py:1b --workdir=/runs/lm_1b
#   ./tpu_vm.sh stop      # from another terminal: all processes save and stop
#   ./tpu_vm.sh delete    # a slice costs money until it is deleted
#
# `train` restarts the run until it is complete and, with SPOT=1, recreates a preempted slice. It follows the log of
# machine 0. It can be interrupted and called again at any time.
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?e.g. us-west4-a}"
: "${IMAGE:?image of launch/clusters/Dockerfile for tpu, in a registry that the slice can read}"
: "${SHARE:?HOST:/PATH of an NFS share, e.g. Filestore, which all machines mount at /runs}"
: "${NAME:=shampax}" "${TYPE:=v5litepod-16}" "${RUNTIME:=v2-alpha-tpuv5-lite}" "${SPOT:=}" "${MAX_RESTARTS:=100}"

tpu() { # VERB ...
  gcloud compute tpus tpu-vm "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

everywhere() { # COMMAND
  tpu ssh --worker=all --command="$1"
}

create() {
  tpu create --accelerator-type="$TYPE" --version="$RUNTIME" ${SPOT:+--spot}
  everywhere "sudo mkdir -p /runs && sudo apt-get install -y -q nfs-common && sudo mount -t nfs $SHARE /runs"
  everywhere "sudo docker pull -q $IMAGE"
}

# Each machine learns its number from the metadata of the TPU, where an endpoint is NAME:NUMBER:IP or IP.
# shellcheck disable=SC2016
PLACE='ask() { curl -sSf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1; }
all=$(ask worker-network-endpoints) && index=$(ask agent-worker-number) || exit 75
first=${all%%,*} commas=${all//[^,]/}
place="-e JAX_COORDINATOR_ADDRESS=${first##*:}:8482 -e JAX_NUM_PROCESSES=$((${#commas} + 1)) -e JAX_PROCESS_ID=$index"'

start() { # FLAGS: start a container on each machine
  local flags
  printf -v flags ' %q' "$@"
  everywhere "${PLACE//$'\n'/; }; sudo docker rm -f shampax >/dev/null 2>&1; sudo docker run -d --name=shampax \
--privileged --user=0 --net=host -v /runs:/runs \$place $IMAGE$flags"
}

follow() { # follow the log of machine 0; print its exit code last, or nothing if the machine is gone
  tpu ssh --worker=0 --command="sudo docker logs -f --tail=20 shampax" >&2 || true
  tpu ssh --worker=0 --command="sudo docker wait shampax" || true
}

train() {
  local code restarts
  for ((restarts = 0; restarts <= MAX_RESTARTS; restarts++)); do
    if [ "$(tpu describe --format='value(state)' || true)" != READY ]; then
      tpu delete --quiet || true
      create
    fi
    start "$@"
    code=$(follow | tail -n 1)
    echo "ended with code ${code:-unknown, the machine is gone}" >&2
    case $code in
      0 | 1 | 2 | 130) exit "$code" ;; # complete, or needs attention, docs/faults.md
      143) [ -n "$SPOT" ] || exit 143 ;; # stopped by `stop` or by a preemption
    esac
  done
  exit "${code:-75}"
}

case ${1:-} in
  create) create ;;
  train) train "${@:2}" ;;
  stop) everywhere "sudo docker stop --time=300 shampax" ;;
  delete) tpu delete --quiet ;;
  *)
    grep '^#  ' "$0" >&2
    exit 2
    ;;
esac
