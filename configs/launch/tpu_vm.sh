#!/usr/bin/env bash
# Trains on all hosts of one or several running TPU slices that gcloud can reach:
#
#   configs/launch/tpu_vm.sh NAME ZONE --config configs/mixtral_8x7b_sft.yaml output_dir=/mnt/shared/run
#
# Copies this repository to each host, installs it, and starts the same command everywhere; the hosts find each other
# through the metadata of their slice. All hosts must have mounted the file system of output_dir at the same path.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: $0 NAME ZONE ARGUMENTS OF xlam_jax.train" >&2
    exit 2
fi
name=$1 zone=$2
shift 2

# Restarts the command after 3 or a kill (a host was lost, and the others exited) and after 75 (a signal stopped the run,
# and it saved); the run continues from the last checkpoint. Stops after any other code, or a signal to this script
# (including Ctrl-C).
read -r -d '' remote <<SCRIPT || true
cd xlam_jax && python3 -m pip install --quiet --user uv \\
    && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv && . .venv/bin/activate \\
    && ~/.local/bin/uv pip install --quiet -c constraints.txt -e '.[tpu]' || exit
trap 'stopped=1' INT TERM HUP
for attempt in {1..20}; do
    python -m xlam_jax.train$(printf ' %q' "$@") && exit
    code=\$?
    [[ (\$code == 3 || \$code == 75 || \$code -gt 130) && -z \$stopped ]] || exit \$code
    sleep 10
done
exit \$code
SCRIPT

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/xlam_jax"
git ls-files -z | xargs -0 cp --parents -t "$copy/xlam_jax"
gcloud compute tpus tpu-vm scp --recurse "$copy/xlam_jax" "$name": --zone "$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "bash -c $(printf '%q' "$remote")"
