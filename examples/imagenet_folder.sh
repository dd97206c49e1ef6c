#!/bin/sh
# Prune a timm checkpoint on an ImageNet-style folder to half of its multiply-accumulates.
#
#   sh examples/imagenet_folder.sh DATA CHECKPOINT OUT [more flags of vitprune-fast run]
#
# DATA holds train/CLASS/*.JPEG and val/CLASS/*.JPEG. MODEL in the environment is timm's name of the
# network (deit_small_patch16_224 unless it is set). The same command on the same OUT resumes.
# With --dry-run it only tells what every step would read and compute, and how long that takes.
set -eu
data=$1 checkpoint=$2 out=$3
shift 3
exec vitprune-fast run \
    --model "${MODEL:-deit_small_patch16_224}" --checkpoint "$checkpoint" \
    --data "folder:$data" --macs 0.5 --out "$out" "$@"
