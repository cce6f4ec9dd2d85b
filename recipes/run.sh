# What the recipes share; sourced, not run. `--dry` as the first word prints the commands and runs none of them.
set -euo pipefail
[ "$PWD" -ef "$(dirname "${BASH_SOURCE[0]}")/.." ] || { echo "run recipes in the checkout's own folder" >&2; exit 2; }
python=${PYTHON:-python} dry=
if [ "${1:-}" = --dry ]; then dry=1 && shift; fi
run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [ -n "$dry" ] || "$@"
}
need() { [ "$1" -ge "$2" ] || { echo "usage: $3" >&2; exit 2; }; }
