#!/usr/bin/env bash
# CIFAR-10 (or any small images in classes): 50,000 images of 32 x 32, kNN and zero-shot on the 10,000 of the test set.
#   recipes/cifar10.sh [--dry] CIFAR OUT TEXT=SPEC NAME=SPEC ... [-- flags of train.py]
# CIFAR holds train.tar and test.tar, or folders train and test: a folder per class. Images are enlarged from 4
# patches to 16; the first teacher is the one whose encode_text embeds the names of the classes.
. "$(dirname "$0")/run.sh"
need $# 3 "recipes/cifar10.sh [--dry] CIFAR OUT TEXT=SPEC NAME=SPEC ... [-- flags of train.py]"
cifar=$1 out=$2 text=$3 teachers=() && shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do teachers+=(--teacher "$1") && shift; done
[ $# -eq 0 ] || shift
[ -d "$cifar/train" ] && train=$cifar/train test=$cifar/test || train=$cifar/train.tar test=$cifar/test.tar
run "$python" data.py cache --images "$train" "${teachers[@]}" --out "$out/cache" --min-tokens 16 --max-tokens 16
run "$python" train.py --cache "$out/cache" --out "$out/run" --steps 2000 --tokens 4096 --optimizer adamw --lr 3e-3 --eval-every 500 "$@"
at=(--model "$out/run" --min-tokens 16 --max-tokens 16)
run "$python" evaluate.py knn --train "$train" --test "$test" "${at[@]}" --out "$out/knn.json"
run "$python" evaluate.py zeroshot --images "$test" --text "$text" "${at[@]}" --out "$out/zeroshot.json"
