#!/usr/bin/env bash
# The toy world, its two oracle teachers, a student, its scores: about 100 s on two CPU cores. Further flags go
# to train.py: recipes/toy.sh --seed 1
. "$(dirname "$0")/run.sh"
run "$python" train.py --eval-every 160 "$@"
