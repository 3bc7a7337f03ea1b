#!/usr/bin/env bash
# Training on a slice of Cloud TPU VMs without Kubernetes:
#
#   export PROJECT=... ZONE=us-west4-a IMAGE=REGISTRY/shampax:tpu SHARE=10.0.0.2:/runs
#   ./tpu_vm.sh create
#   ./tpu_vm.sh train --config=shampax/configs/lm.py:1b --workdir=/runs/lm_1b
#   ./tpu_vm.sh stop      # from elsewhere: all processes save and stop
#   ./tpu_vm.sh delete    # what is not deleted costs money
#
# `train` goes on until the run is complete, over restarts, and over preemptions too where the slice is spot: then it
# creates it anew. It follows the log of machine 0, and can itself be ended and called again at any time.
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}"
: "${IMAGE:?made by launch/clusters/Dockerfile for tpu, in a registry that the slice may read}"
: "${SHARE:?HOST:/PATH of an NFS share, such as Filestore, that all machines mount at /runs}"
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

start() { # FLAGS: a container on each machine, which finds the others by the TPU's metadata
  local flags
  printf -v flags ' %q' "$@"
  everywhere "sudo docker rm -f shampax >/dev/null 2>&1; sudo docker run -d --name=shampax --privileged --user=0 \
--net=host -v /runs:/runs $IMAGE$flags"
}

follow() { # until machine 0 has ended; prints its exit code last, and nothing where the machine is gone
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
      0 | 1 | 2 | 130) exit "$code" ;; # complete, or somebody should look first, docs/faults.md
      143) [ -n "$SPOT" ] || exit 143 ;; # asked to stop: by `stop`, or because the slice is being taken away
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
