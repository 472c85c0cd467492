#!/usr/bin/env bash
# The demo of `make demo`: make a small trained Vim faster within a limit on real digits, and compare it with the dense model.
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

images=(--calib recipes/demo/calib.npz --dataset npz --data recipes/demo/test.npz)

run ssmprune inspect recipes/demo/vim_digits.pth
# At most one point: a smaller image and fewer blocks, which save work at every batch size; the head is refitted.
run ssmprune compress recipes/demo/vim_digits.pth --resize 60 --cut-blocks 2 --max-drop 1 --judge estimate "${images[@]}" \
  --out demo-out/vim_digits_fast --overwrite
run ssmprune profile demo-out/vim_digits_fast --compare recipes/demo/vim_digits.pth --batch-size 1
# More tokens dropped for more points, without a limit: a picture of what is kept where.
run ssmprune compress recipes/demo/vim_digits.pth --keep 0.6 "${images[@]}" \
  --out demo-out/vim_digits_k60 --overwrite
run ssmprune visualize demo-out/vim_digits_k60 recipes/demo/test.npz --out demo-out/pictures
run ssmprune report demo-out/vim_digits_fast demo-out/vim_digits_k60 --format markdown
