#!/bin/bash
# Trains one stage on all hosts of a TPU pod slice. From the repository root:
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket experiments/launch/tpu_pod.sh create
#   ... experiments/launch/tpu_pod.sh install
#   ... experiments/launch/tpu_pod.sh train experiments/configs/mono_internvl.py:S1.1,v5e-16 /mnt/runs/s1_1
#   ... experiments/launch/tpu_pod.sh delete
#
# The bucket is mounted at /mnt on every host (gcsfuse); workdir and data are there. "train" restarts a run that exits
# with 75 (stopped and saved) or 76 (a host was lost), and the run resumes.
set -eu
NAME=${NAME:-mono-jax}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT---spot}  # SPOT= for on-demand nodes
MAX_RESTARTS=${MAX_RESTARTS:-50}
WHERE=(--project="${PROJECT:?}" --zone="${ZONE:?}")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
}

case ${1:?create, install, train or delete} in
  create)
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"}
    ;;
  install)
    git archive --format=tar.gz -o /tmp/mono-jax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/mono-jax.tar.gz "$NAME":mono-jax.tar.gz "${WHERE[@]}" --worker=all
    on_all_hosts "mkdir -p mono-jax && tar -xzf mono-jax.tar.gz -C mono-jax && python3 -m venv mono-jax/.venv &&
      mono-jax/.venv/bin/pip install -q -c mono-jax/requirements/tpu.txt -e 'mono-jax[tpu,cloud]' &&
      sudo mkdir -p /mnt/${BUCKET:?} && sudo gcsfuse --implicit-dirs -o allow_other $BUCKET /mnt/$BUCKET"
    ;;
  train)
    CONFIG=${2:?config file} WORKDIR=${3:?workdir}
    shift 3
    for ((restart = 0; restart <= MAX_RESTARTS; restart++)); do
      code=0
      on_all_hosts "cd mono-jax && .venv/bin/python experiments/train.py --config=$CONFIG --workdir=$WORKDIR $*" || code=$?
      [[ $code == 75 || $code == 76 ]] || exit $code
      echo "exit code $code: restarting"
      sleep 60
    done
    exit $code
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force
    ;;
  *)
    echo "error: $1 is none of create, install, train, delete" >&2
    exit 2
    ;;
esac
