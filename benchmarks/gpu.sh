#!/usr/bin/env bash
# All figures of one Hopper GPU, piece by piece, each in less than ten minutes.
#
#   bash benchmarks/gpu.sh             every piece that has no result yet for this code and this device
#   bash benchmarks/gpu.sh PIECE...    some pieces
#   bash benchmarks/gpu.sh list        their names
#
# A piece that fails is named at the end, the others go on, and the exit status is 1. From the environment:
#   PYTHON   Python 3.12 with torch 2.11 for CUDA (python3)
#   BUNDLE   folder with install_gpu_bundle.sh, manifest.txt and parts: Transformer Engine, megatron-core, DALI for a machine
#            without network. Unset: those of the environment
#   WHEELS   folder of wheels, from which missing Python packages are installed; nothing is fetched
#   SITE     where both are put (a folder below the temporary one)
#   RESULTS  where results go (benchmarks/results; with DEVICE=cpu runs/gpu_rehearsal)
#   LOGS     where their output goes (runs/gpu_logs)
#   COMMIT   what results call the commit, where the sources came without git
#   FORCE    1: repeat pieces that have a result
#   LIMIT    seconds that a piece may take (570)
#   DEVICE   cpu: a rehearsal at tiny sizes, whose figures mean nothing (cuda)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PIECES=(install same_answers fp8_curves training_speed prefill profile_step decode)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SITE=${SITE:-${TMPDIR:-/tmp}/megatron_elva_gpu}
LIMIT=${LIMIT:-570}
[ "$DEVICE" = cpu ] && RESULTS=${RESULTS:-runs/gpu_rehearsal}
RESULTS=${RESULTS:-benchmarks/results}
LOGS=${LOGS:-runs/gpu_logs}

about() {
  case $1 in
    install) echo "what is installed works: imports, a layer in bf16 and in each FP8 recipe" ;;
    same_answers) echo "logits, loss, gradients and merge index against fp32 on the CPU" ;;
    fp8_curves) echo "200 steps in bf16 and in each FP8 recipe: loss curves" ;;
    training_speed) echo "tokens/s, MFU and memory of the 1.5B model, bf16 and FP8, merging none and fast" ;;
    prefill) echo "time of a prefill of the 7B model at 32 frames, merging none and fast" ;;
    profile_step) echo "where the time of a training step goes, and what waits for the device" ;;
    decode) echo "frames/s of NVDEC through DALI and of PyAV" ;;
  esac
}

# Sizes of a rehearsal.
tiny() {
  local shape=(--model tiny --set --frames 4 --grid 4 --text 12 --vocab 64)
  case $1 in
    install) ;;
    same_answers) echo "${shape[@]}" --gradient-limit 0.05 ;;
    fp8_curves) echo "${shape[@]}" --samples 4 --videos 8 --steps 20 ;;
    training_speed) echo "${shape[@]}" --micro 2 --warmup 1 --repeats 2 ;;
    prefill | profile_step) echo "${shape[@]}" --warmup 1 --repeats 2 ;;
    decode) echo --sizes 360p --codec libvpx-vp9 --seconds 1 --rate 8 --frames 4 --files 1 --batch 2 --processes 1 --rounds 1 ;;
  esac
}

has_module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

install_bundle() {
  [ -z "${BUNDLE:-}" ] && return 0
  PYTHON=$PYTHON PARTS=$SITE/parts CHECK=0 bash "$BUNDLE/install_gpu_bundle.sh" "$BUNDLE" "$SITE/bundle" && return 0
  echo "BUNDLE=$BUNDLE: cannot be installed; it needs install_gpu_bundle.sh, manifest.txt and the parts" >&2
  return 1
}

# Packages by module. Without the first four nothing runs; decode needs av and PIL, and a picture matplotlib.
install_wheels() {
  local pair module package lacking=0
  for pair in yaml:PyYAML antlr4:antlr4-python3-runtime omegaconf:omegaconf hydra:hydra-core av:av PIL:Pillow matplotlib:matplotlib; do
    module=${pair%%:*} package=${pair#*:}
    has_module "$module" && continue
    [ -n "${WHEELS:-}" ] && "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" \
      --target "$SITE/wheels" --upgrade "$package" && has_module "$module" && continue
    echo "$package is missing: put its wheel into a folder and give WHEELS=FOLDER" >&2
    case $module in yaml | antlr4 | omegaconf | hydra) lacking=1 ;; esac
  done
  return $lacking
}

# Whether a piece has a good result of this code on this device.
is_done() {
  local file=$RESULTS/gpu_$1.json
  [ "${FORCE:-0}" != 1 ] && [ -f "$file" ] && grep -qF "\"code\": \"$code\"" "$file" &&
    grep -qF "\"device\": \"$device\"" "$file" && grep -qF '"status": "ok"' "$file"
}

chosen=("${PIECES[@]}")
if [ $# -gt 0 ]; then
  if [ "$1" = list ]; then
    for piece in "${PIECES[@]}"; do printf '%-16s%s\n' "$piece" "$(about "$piece")"; done
    exit 0
  fi
  chosen=("$@")
fi
for piece in "${chosen[@]}"; do
  if [ -z "$(about "$piece")" ]; then
    echo "$piece: no such piece; there are: ${PIECES[*]}" >&2
    exit 2
  fi
done

mkdir -p "$SITE/wheels" "$RESULTS" "$LOGS" || exit 1
install_bundle || exit 1
# shellcheck disable=SC1091
[ -f "$SITE/bundle/env.sh" ] && . "$SITE/bundle/env.sh"
export PYTHONPATH="$SITE/wheels${PYTHONPATH:+:$PYTHONPATH}"
install_wheels || exit 1
state=$("$PYTHON" -m benchmarks.gpu.state "$DEVICE") || { echo "DEVICE=$DEVICE: cannot be used, see above; it needs torch for this device and megatron-core" >&2; exit 1; }
code=$(sed -n 1p <<<"$state") device=$(sed -n 2p <<<"$state")
echo "code $code on $device, results in $RESULTS"

failed=()
for piece in "${chosen[@]}"; do
  if is_done "$piece"; then
    echo "== $piece: done before"
    continue
  fi
  echo "== $piece: $(about "$piece")"
  sizes=
  [ "$DEVICE" = cpu ] && sizes=$(tiny "$piece")
  began=$SECONDS
  # shellcheck disable=SC2086  # sizes are words
  timeout --kill-after=15 "$LIMIT" "$PYTHON" -u -m "benchmarks.gpu.$piece" --device "$DEVICE" $sizes --out "$RESULTS" 2>&1 |
    tee "$LOGS/$piece.log"
  status=${PIPESTATUS[0]}
  echo "== $piece: exit status $status after $((SECONDS - began)) s"
  [ "$status" = 0 ] || failed+=("$piece")
done
if [ ${#failed[@]} -gt 0 ]; then
  for piece in "${failed[@]}"; do echo "FAILED: $piece, see $LOGS/$piece.log" >&2; done
  exit 1
fi
