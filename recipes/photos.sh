#!/usr/bin/env bash
# Your own photos, any teachers: cache, check, train, measure.
#   recipes/photos.sh [--dry] PHOTOS OUT NAME=SPEC NAME=SPEC ... [-- flags of train.py]
# Measured on 538 photos and two small teachers (docs/evaluate.md); 600 steps are 37 passes over them: with fewer photos, fewer steps.
. "$(dirname "$0")/run.sh"
need $# 3 "recipes/photos.sh [--dry] PHOTOS OUT NAME=SPEC ... [-- flags of train.py]"
photos=$1 out=$2 teachers=() && shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do teachers+=(--teacher "$1") && shift; done
[ $# -eq 0 ] || shift
run "$python" data.py cache --images "$photos" "${teachers[@]}" --out "$out/cache"
run "$python" data.py verify "$out/cache"
run "$python" train.py --cache "$out/cache" --out "$out/run" --steps 600 --tokens 4096 --optimizer adamw --lr 3e-3 --eval-every 200 "$@"
run "$python" evaluate.py pca --model "$out/run" --images "$photos" --out "$out/pca.json"
