#!/usr/bin/env bash
# The paper's student in the paper's two stages on one machine of 8 GPUs: images of up to 256 patches; then, from those
# weights, budgets of 256, 1024 and 2304 patches (768 x 768 pixels) in one run, so that small images are not forgotten.
#   recipes/amoe-0.3b.sh [--dry] [--cached] IMAGES OUT SIGLIP2 DINOV3 [-- flags of both train.py]
# SIGLIP2, DINOV3: weights (docs/train.md says where from). Teachers run at every step; with --cached their features are
# stored first. `--dry` prints the commands and, before each stage, what it will cost; set the steps to what you can afford.
# Nobody has run this here: learning rates and steps are a starting point, and the paper's own are not known to us.
. "$(dirname "$0")/run.sh"
cached= && if [ "${1:-}" = --cached ]; then cached=1 && shift; fi
need $# 4 "recipes/amoe-0.3b.sh [--dry] [--cached] IMAGES OUT SIGLIP2 DINOV3 [-- flags of both train.py]"
images=$1 out=$2 teachers=(--teacher "siglip2=$3" --teacher "dinov3=$4") gpus=${GPUS:-8} && shift 4
[ $# -eq 0 ] || shift

stage() { # name, budgets, words
  local name=$1 budgets=$2 from=(--images "$images" "${teachers[@]}" --max-tokens $2) && shift 2
  if [ -n "$cached" ]; then
    run "$python" data.py cache --images "$images" "${teachers[@]}" --max-tokens $budgets --out "$out/$name-cache"
    from=(--cache "$out/$name-cache")
  fi
  "$python" recipes/cost.py --budgets $budgets --gpus "$gpus" --mfu 0.2 "$@"
  run "$python" -m torch.distributed.run --nproc-per-node "$gpus" train.py "${from[@]}" "$@" --out "$out/$name"
}

common=(--model amoe-0.3b --optimizer adamw --tokens 16384 --arkd 1 --workers 4 --save-every 2000 --eval-every 2000)
stage one "256" "${common[@]}" --steps 300000 --lr 1e-3 --warmup 2000 "$@"
stage two "256 1024 2304" "${common[@]}" --steps 30000 --lr 2e-4 --warmup 500 --init "$out/one" "$@"
