#!/usr/bin/env bash
# The mini model's sounds for held-out clips in bfloat16 and float32, eight processes on the one GPU; judged elsewhere:
#   python evaluate.py --data HELD --samples DIR
# CLIPS (96) films are drawn; the sounds come as $OUT/bf16.tar.aa and $OUT/fp32.tar.aa, ... in pieces of 15 MB.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
PYTHON=${PYTHON:-python3}
CLIPS=${CLIPS:-96}
RANKS=${RANKS:-8}
[ -n "$DRY" ] && CLIPS=2 RANKS=1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
"$PYTHON" foley.py "$WORK/held" --clips "$CLIPS" --seed 1 --workers "$(nproc)" 2>&1 | tail -1
echo "rendered in $SECONDS s; $(cat "$WORK"/held/*.mp4 | sha256sum)"
ranks=()
for ((rank = 0; rank < RANKS; rank++)); do
    "$PYTHON" -m tools.gpu.mini "$WORK/held" "$rank" "$RANKS" "$WORK/out" &
    ranks+=($!)
done
for process in "${ranks[@]}"; do
    wait "$process" || exit 1
done
for dtype in bf16 fp32; do
    tar c -C "$WORK/out" $dtype | split -b 15M - "$OUT/$dtype.tar."
done
ls -l "$OUT"
