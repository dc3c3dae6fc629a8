#!/usr/bin/env bash
# What is worth knowing from a GPU, in one call, the most valuable first. Each part has its own timeout and writes as it
# learns; the sum is at most TOTAL seconds. From the project's root, on a machine with one NVIDIA GPU:
#
#   bash tools/gpu/check.sh                 tests, a guided step in all variants, sample.py, tables; TOTAL=540
#   TOTAL=200 bash tools/gpu/check.sh quick tests, a guided step of ours and of torch's kernels, sample.py with both sizes
#   TOTAL=230 bash tools/gpu/check.sh sweep block sizes, memory of training, the mini model in both dtypes, 64 clips
#   DRY=1 bash tools/gpu/check.sh quick     without a GPU: the same flow, small networks
#
# Results go to $OUT (/tmp/out). Where av and soundfile are not installed, wheels of av, soundfile, cffi and pycparser may
# lie in .whl/ (av also as .whl/av.tar.xz, unpacked); without them the parts that read films are left out.
export OUT=${OUT:-/tmp/out} TOTAL=${TOTAL:-540} PYTHONUNBUFFERED=1 TMPDIR=${TMPDIR:-/tmp}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$TMPDIR/triton-cache}
SITE=$TMPDIR/site
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python3}
MODE=${1:-all}
case $MODE in
all | quick | sweep) ;;
*)
    echo "check.sh: $MODE is none of all, quick, sweep"
    exit 2
    ;;
esac
DEVICE=cuda
[ -n "$DRY" ] && DEVICE=cpu
mkdir -p "$OUT"
LOG=$OUT/log.txt
WEIGHTS=/dev/shm/paper.$$
[ -w /dev/shm ] || WEIGHTS=$TMPDIR/paper.$$
DEMO=$(mktemp -d)
trap 'rm -rf "$WEIGHTS" "$DEMO"' EXIT
cp demo.mp4 "$DEMO/one.mp4"
cp demo.mp4 "$DEMO/two.mp4"
cp demo.mp4 "$DEMO/three.mp4"
mkdir "$DEMO/many"
for k in 1 2 3 4 5 6 7 8; do cp demo.mp4 "$DEMO/many/$k.mp4"; done

say() { echo "$@" | tee -a "$LOG"; }

# NAME LIMIT COMMAND...: under its own timeout, cut to what is left
part() {
    local name=$1 limit=$2 from=$SECONDS
    local left=$((TOTAL - SECONDS - 3))
    shift 2
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 12 ]; then
        say "== $name: left out, $left s left"
        return
    fi
    say "== $name (at $SECONDS s, at most $limit)"
    timeout -k 3 "$limit" "$@" 2>&1 | tee -a "$LOG"
    say "== $name: exit ${PIPESTATUS[0]}, $((SECONDS - from)) s"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

setup() {
    if ! has av || ! has soundfile; then
        ls .whl/*.whl >/dev/null 2>&1 && "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
            --no-cache-dir --upgrade --target "$SITE" .whl/*.whl
        [ -f .whl/av.tar.xz ] && mkdir -p "$SITE" && tar xf .whl/av.tar.xz -C "$SITE"
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader
    "$PYTHON" -c "import sys, torch, numpy; print(sys.version.split()[0], torch.__version__, numpy.__version__, 'cudnn', torch.backends.cudnn.version())"
}

say "== setup"
setup 2>&1 | tee -a "$LOG"
FILMS=1
if ! has av || ! has soundfile; then
    # kernels and networks need neither: names are enough
    say "no av or soundfile; stand-ins, and nothing that reads films"
    FILMS=
    mkdir -p "$TMPDIR/stub/av/video"
    touch "$TMPDIR/stub/av/__init__.py" "$TMPDIR/stub/av/video/__init__.py" "$TMPDIR/stub/soundfile.py"
    echo 'class VideoReformatter: pass' > "$TMPDIR/stub/av/video/reformatter.py"
    export PYTHONPATH=$TMPDIR/stub:$PYTHONPATH
fi
JOBS=$(($(nproc) > 2 ? $(nproc) - 2 : 1))
FEW=()          # what is compiled ahead, and what is drawn, on a machine without a GPU
SMALL=()
STEPS=()
CLIPS=()
TRAIN=(--measure)
TRAIN_LIMIT=60
[ -n "$DRY" ] && TRAIN_LIMIT=300 TRAIN=(--stages ldm --preset mini --micro-batches 1)
[ -n "$DRY" ] && FEW=(--only 4) SMALL=(--mini) STEPS=(--steps 2) CLIPS=(--clips 1)
[ -z "$DRY" ] && has xdist && N=(-n 6)

dub() { # NAME WEIGHTS: one film in two processes, then three in one, whose later ones find the graph recorded
    local name=$1 weights=$2
    [ -n "$FILMS" ] || return
    for run in 1 2; do
        part "$name, run $run" 45 "$PYTHON" sample.py demo.mp4 --device $DEVICE --weights "$weights" "${STEPS[@]}" --profile -v --overwrite --out "$DEMO/out$run"
    done
    part "$name, three films" 45 "$PYTHON" sample.py "$DEMO"/{one,two,three}.mp4 --device $DEVICE --weights "$weights" "${STEPS[@]}" --profile --json --overwrite --out "$DEMO/out3"
    # windows of eight films one by one, and all in one batch
    for batch in 1 8; do
        part "$name, eight films, batch $batch" 60 "$PYTHON" sample.py "$DEMO"/many/ --batch $batch --device $DEVICE --weights "$weights" "${STEPS[@]}" --json --overwrite --out "$DEMO/out8-$batch"
    done
}

say "== setup: $SECONDS s"
case $MODE in
quick)
    part warm 45 "$PYTHON" -m tools.gpu.warm -j $JOBS "${FEW[@]}"
    part tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py "${N[@]}" --maxfail=20 --tb=short -W ignore
    part steps 40 "$PYTHON" -m tools.gpu.step --out "$OUT" "${CLIPS[@]}" --only ours "torch's kernels, same graph"
    dub "demo" mini
    part weights 45 "$PYTHON" -m tools.gpu.weights "$WEIGHTS" "${SMALL[@]}"
    dub "demo, published size" "$WEIGHTS"
    ;;
sweep)
    # 225 s in all, and some to set up
    part warm 35 "$PYTHON" -m tools.gpu.warm -j $JOBS --sets sweep train "${FEW[@]}"
    part train $TRAIN_LIMIT "$PYTHON" -m tools.training_memory "${TRAIN[@]}" --cards --out "$OUT/training_memory.jsonl"
    [ -n "$DRY" ] || part sweep 40 "$PYTHON" -m tools.gpu.sweep --out "$OUT"
    [ -n "$FILMS" ] && part "mini in both dtypes" 65 bash tools/gpu/mini.sh
    [ -n "$DRY" ] || part "8 and 64 clips" 25 "$PYTHON" -m tools.speed_gpu --ways ours --clips 8 64 --runs 1 --out "$OUT/speed64"
    ;;
all)
    part warm 75 "$PYTHON" -m tools.gpu.warm -j $JOBS "${FEW[@]}"
    part tests 110 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py "${N[@]}" --maxfail=20 --tb=short -W ignore
    part steps 110 "$PYTHON" -m tools.gpu.step --out "$OUT" "${CLIPS[@]}" --only ours "torch's kernels, same graph" "one stream" "attention: torch's" "group norm: torch's" "layer norm, geglu: torch's"
    # a process of its own: the first plan that cuDNN takes for a shape stays
    part "steps, cudnn.benchmark" 70 "$PYTHON" -m tools.gpu.step --out "$OUT" "${CLIPS[@]}" --only cudnn.benchmark
    dub "demo" mini
    part weights 45 "$PYTHON" -m tools.gpu.weights "$WEIGHTS" "${SMALL[@]}"
    dub "demo, published size" "$WEIGHTS"
    if [ -z "$DRY" ]; then
        for name in attention group_norm transformer; do
            part "places of $name" 40 "$PYTHON" -m kernels.$name --batch 2 16 --mode default --out "$OUT/$name"
        done
        part "table" 170 "$PYTHON" -m tools.speed_gpu --ways ours torch eager compiled --mode reduce-overhead --clips 1 8 --runs 3 --out "$OUT/speed"
    fi
    ;;
esac
say "== done at $SECONDS s"
