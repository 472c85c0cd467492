#!/usr/bin/env bash
# The demo of `make demo`: compress a small trained Vim with real digits, and compare it with the dense model.
# `ssmprune` must be on the PATH. Everything is written to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Threads that wait by spinning take the processor from those they wait for: on a busy machine that is many times slower.
# Those that sleep at once wake up late: after a short spin both are rare.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

run ssmprune inspect recipes/demo/vim_digits.pth
run ssmprune compress recipes/demo/vim_digits.pth --keep 0.6 --batch-size 64 --calib recipes/demo/calib.npz \
  --dataset npz --data recipes/demo/test.npz --out demo-out/vim_digits_k60 --overwrite
run ssmprune profile demo-out/vim_digits_k60 --compare recipes/demo/vim_digits.pth --batch-size 64
run ssmprune visualize demo-out/vim_digits_k60 recipes/demo/test.npz --out demo-out/pictures
run ssmprune report demo-out/vim_digits_k60 --format markdown
