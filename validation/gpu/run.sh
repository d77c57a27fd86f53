#!/usr/bin/env bash
# All that a machine with a GPU can show, each part for itself, so that one that fails costs no other. Writes into OUT as it
# goes, and after each part into OUT.tgz; the last lines count what failed and what found no time (exit codes 1 and 3).
#
#   validation/gpu/run.sh [OUT [PART...]]        default: gpu-results, all parts, as many as 8 minutes take
#
# PART: patterns of parts' names, like 'nccl-*', or a set that fits into one go: 'first' (mathematics on one rank, calibration, the
# networks' times), 'second' (a layer beside PyTorch's, products, replays, four ranks, NCCL's estimates), 'third' (two ranks' suites,
# attention, compute-sanitizer).
# PARTITA, GPU_TEST: the programs (default: the bundle's, which has cuDNN's attention and whose host code is timed too, else build/release's and build/dev's). LIMIT: seconds in all (default: 480).
set -uo pipefail
# In the sources, or in the bundle's folder.
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/bin/partita" ]; then
  cd "$here"
  export PARTITA_DATA=$here/data
else
  cd "$here/../.."
fi
out=${1:-gpu-results}
wanted=()
for name in "${@:2}"; do
  case $name in
    first) wanted+=(nvidia-smi kernels kernels-narrow one-rank one-rank-narrow nccl-dp2 records 'validate*' memory-bound) ;;
    second) wanted+=(layer products replay-llama replay-gpt3 'nccl-4-*' nccl-estimates) ;;
    third) wanted+=('flash*' nccl-suite suite-in-memory racecheck-flash memcheck-bf16 racecheck-bf16) ;;
    *) wanted+=("$name") ;;
  esac
done
mkdir -p "$out"
# Whoever is ended has what came before.
archive() { tar czf "$out.tgz.new" -C "$(dirname "$out")" "$(basename "$out")" 2>/dev/null && mv "$out.tgz.new" "$out.tgz"; }
first() { for p in "$@"; do [ -x "$p" ] && { echo "$p"; return; }; done; }
partita=${PARTITA:-$(first ./bin/partita build/bundle/partita build/release/partita build/dev/partita)}
gpu_test=${GPU_TEST:-$(first ./bin/gpu_test build/bundle/tests/runtime/gpu_test build/dev/tests/runtime/gpu_test)}
[ -n "$partita" ] && [ -n "$gpu_test" ] || { echo "run.sh: no partita or gpu_test here: build them (./setup bundle), or name them in PARTITA and GPU_TEST" >&2; exit 2; }
# Wheels keep the libraries in folders of their own.
wheels=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null || true)
if [ -n "$wheels" ]; then
  for d in "$wheels"/*/lib; do LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$d; done
  export LD_LIBRARY_PATH
fi
failed=() left_out=()
began=$(date +%s)
limit=${LIMIT:-480}
part() {  # name, most seconds, [checked,] command...
  local name=$1 most=$2 checked=no
  shift 2
  [ "$1" = checked ] && checked=yes && shift
  if [ ${#wanted[@]} -gt 0 ]; then
    local matches=no pattern
    for pattern in "${wanted[@]}"; do
      # shellcheck disable=SC2053
      [[ $name == $pattern ]] && matches=yes
    done
    [ $matches = yes ] || return
  fi
  local start=$(date +%s)
  local left=$((began + limit - start - ${reserve:-0}))
  # One that would be ended in its midst shows less than what may come after it.
  if [ $((10 * left)) -lt $((6 * most)) ] || [ "$left" -lt 5 ]; then
    printf '%-28s       left out: no time\n' "$name" | tee -a "$out/summary.txt"
    left_out+=("$name")
    return
  fi
  [ "$most" -le "$left" ] || most=$left
  # What it says is kept, also of one that hangs or dies.
  timeout --kill-after=10 "$most" "$@" >"$out/$name.txt" 2>&1
  local code=$?
  # A test that was skipped has shown nothing.
  [ $code -eq 0 ] && grep -q '^\[  SKIPPED \]' "$out/$name.txt" && code=skipped
  # A run whose loss met no serial network's has shown no mathematics.
  [ "$code" = 0 ] && [ "$checked" = yes ] && ! grep -q '"equal_to_serial": true' "$out/$name.txt" && code="not beside the serial network"
  # Nor has one without NCCL shown NCCL's.
  [ "$code" = 0 ] && grep -qE '"no_links"|messages pass through the host' "$out/$name.txt" && code="NCCL refused"
  # Nor has a step that was launched kernel by kernel shown CUDA graphs.
  [ "$code" = 0 ] && [[ $name == *graph ]] && grep -qE '"why_not"|"no_graph"' "$out/$name.txt" && code="no CUDA graph"
  # A suite is its plans' mathematics: what NCCL expects, and times on a shared GPU, are judged elsewhere.
  [ "$code" = 1 ] && [[ $name == nccl-suite || $name == suite-in-memory ]] && grep -q '"equal_to_reference": true' "$out/$name.txt" && ! grep -q '"equal_to_reference": false' "$out/$name.txt" && code=0
  # Nor have estimates that nothing was put beside.
  [ "$code" = 0 ] && [ "$name" = nccl-estimates ] && ! grep -q '"nccl_estimates"' "$out/$name.txt" && code="no estimates"
  local took=$(($(date +%s) - start))
  printf '%-28s %4d s  %s\n' "$name" "$took" "$([ "$code" = 0 ] && echo ok || echo "FAILED ($code): $({ grep -m1 -E '^partita:|"reason"|"error"|FAILED|MISSED' "$out/$name.txt" || grep -v '^[]}[{ ,]*$' "$out/$name.txt" | tail -1; } | cut -c1-200)")" | tee -a "$out/summary.txt"
  [ "$code" = 0 ] || failed+=("$name")
  archive
}
[ ${#wanted[@]} -gt 0 ] || : >"$out/summary.txt"
{ date -u; git rev-parse HEAD 2>/dev/null; uname -r; ldd "$(dirname "$partita")/libpartita_cuda.so" | grep -iE 'cuda|cublas|cudnn|nccl'; } >"$out/about.txt" 2>&1
part nvidia-smi 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.total,memory.used --format=csv
# In order of worth: what fails or finds no time left costs nothing that stands before it.
part kernels 50 env PARTITA_CUDA_CHECK=1 "$gpu_test" --gtest_filter='Gpu.KernelsEqualTheReferences:Gpu.Parts*:Gpu.Moves*:Gpu.Draws*:Gpu.NarrowNumbers*:Gpu.RowsOf*'
part kernels-narrow 50 env PARTITA_CUDA_CHECK=1 "$gpu_test" --gtest_filter='Gpu.KernelsEqualTheReferencesIn*'
part flash 40 env PARTITA_CUDA_CHECK=1 PARTITA_CUDA_FLASH=own "$gpu_test" --gtest_filter='Gpu.Flash*'
part one-rank 40 "$gpu_test" --gtest_filter='Gpu.TrainsOnOneRank:Gpu.TrainsWith*:Gpu.RanksAgree*:Gpu.ARankAlone*'
part one-rank-narrow 40 "$gpu_test" --gtest_filter='Gpu.TrainsOnOneRankInNarrowTypes'
files=$here
[ -d "$here/data" ] && files=$here/data/validation/gpu
# Two ranks on this GPU over NCCL, beside the serial network; more of it follows below.
small=(--micro-batch 2 --global-batch 4 --steps 3 --backend cuda --json)
share=(--share-gpu --ranks 2 --transport tcp --timeout 30)
part nccl-dp2 50 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" "${share[@]}" --dp 2
# CUPTI comes and goes with each run that is recorded, so that later ones are not slowed; where it can't, it stays.
part records 40 "$partita" calibrate --backend cuda --only "CUDA graph" --rounds 3 --out "$out/records"
grep -qs '^records .*FAILED' "$out/summary.txt" && export PARTITA_CUPTI_STAYS=1
# Calibration, the suite's mathematics and the networks' times; the profile and both journals stay in OUT/profile. What it leaves
# when it is ended still takes a report.
reserve=65 part validate 300 "$partita" validate --backend cuda --budget 140s --out "$out/profile"
# Ended in its midst, it has its journals all the same: what they say.
[ -e "$out/profile/device.yaml" ] || part validate-report 60 env PARTITA_CUPTI_STAYS=1 "$partita" validate --backend cuda --budget 1s --rounds 1 --out "$out/profile"
# What we execute beside copies.
part memory-bound 10 python3 "$files/speed.py" memory "$out/profile/device.yaml"
# A layer beside PyTorch's, with whatever attention this build has; then with our own kernels.
part layer 70 python3 "$files/layer.py" "$partita"
part layer-own-attention 40 env PARTITA_CUDA_FLASH=own python3 "$files/layer.py" "$partita" --only-ours
part flash-of-cudnn 60 env PARTITA_CUDA_CHECK=1 PARTITA_CUDA_FLASH=cudnn "$gpu_test" --gtest_filter='Gpu.Flash*'
# What we execute beside the best that the library has.
part products 80 python3 "$files/speed.py" products "$partita"
# A rank each of published runs on 64, 128 and 256 H100s, at its true shapes, beside their steps; without the tables the same plans alone.
replay=(--backend cuda --micro-batches 8 --warm-up 1 --steps 3 --json)
tables=${PARTITA_REFERENCE:-../shared/reference}
if [ -e "$tables/llm_training.csv" ]; then
  replay+=(--data "$tables")
  llama=(--row dgxc-1b9bb6b-Llama_3.x_70B-BF16-H100-64-143)
  gpt3=(--row dgxc-1b9bb6b-GPT-3_175B-BF16-H100-128-195)
  grok=(--row dgxc-1b9bb6b-Grok-1_314B-BF16-H100-256-118)
else
  echo "no published tables in $tables: plans are replayed without their steps beside (PARTITA_REFERENCE)" | tee -a "$out/summary.txt"
  llama=(llama-3-70b dgx-h100:8 --sequence-parallel --zero 1 --tp 4 --pp 4 --virtual-stages 5 --cp 2 --global-batch 128)
  gpt3=(gpt3-175b dgx-h100:16 --sequence-parallel --zero 1 --tp 4 --pp 8 --virtual-stages 12 --global-batch 256)
  grok=(grok-1 dgx-h100:32 --sequence-parallel --zero 1 --layers 32 --tp 4 --pp 4 --virtual-stages 8 --cp 2 --ep 8 --global-batch 1024)
fi
part replay-llama 45 "$partita" replay "${llama[@]}" "${replay[@]}"
# What tracing costs: the same replay with the GPU's own records.
part replay-traced 45 env PARTITA_CUDA_TRACE="$out/trace.json" "$partita" replay "${llama[@]}" "${replay[@]}"
part tracing 10 python3 -c '
import json, sys
def read(f):
  text = open(f).read()  # with what was said beside it
  return json.loads(text[text.index("{"):text.rindex("}") + 1])
plain, traced = (read(f)["steps_s"]["plain"] for f in sys.argv[1:3])  # by one clock in both
events = json.load(open(sys.argv[3]))["traceEvents"]
kernels = len(events)
assert any(e["args"]["called for"] for e in events), "no record says for which operator it was"
print(f"{kernels} records; a step {plain:.6f} s, traced {traced:.6f} s: {100 * (traced / plain - 1):+.2f} %")
' "$out/replay-llama.txt" "$out/replay-traced.txt" "$out/trace.json"
[ -e "$out/trace.json" ] && gzip -f "$out/trace.json"
part replay-gpt3 45 "$partita" replay "${gpt3[@]}" "${replay[@]}"
part replay-grok 45 "$partita" replay "${grok[@]}" "${replay[@]}"
part nccl-tp2-bf16 50 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" "${share[@]}" --tp 2 --precision bf16
# Every plan of the suite on two ranks over NCCL, each beside its reference.
part nccl-suite 170 "$partita" validate --backend cuda "${share[@]}" --calibrate-only transfers --rounds 1 --steps 1 --out "$out/suite" --json
part gpt2 40 "$partita" run gpt2 --layers 2 --seq 64 --vocabulary 256 "${small[@]}" --precision bf16
# Steps as one CUDA graph each: the same values; the same over NCCL; what that is worth to a rank of small kernels.
part graph 35 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" --set launch.graphs=true
part nccl-graph 50 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" "${share[@]}" --dp 2 --zero 1 --set launch.graphs=true
part replay-graph 35 "$partita" replay gpt2 dgx-h200:1 --dp 8 --global-batch 8 --backend cuda --steps 3 --set launch.graphs=true --json
part ranks-of-one-process 60 "$gpu_test" --gtest_filter='Gpu.TrainsOnSeveral*'
# Every plan of the suite on two and four ranks whose exchanges are copies in the GPU's memory: what NCCL has no part in.
part suite-in-memory 90 "$partita" validate --backend cuda --share-gpu --ranks 2,4 --transport threads --calibrate-only collectives --rounds 1 --steps 1 --out "$out/in-memory" --json
part nccl-pp2 50 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" "${share[@]}" --pp 2
part nccl-zero3 50 checked "$partita" run "$files/gpt-small.yaml" "${small[@]}" "${share[@]}" --dp 2 --zero 3
# What kernels take beside a stand-in for NCCL, over alone: waves or a part of the multiprocessors? In OUT/slowdown.
part slowdown 40 bash -c '"$0" calibrate --backend cuda --only "kernels beside" --out "$1" && grep -q "beside: stand_in" "$1/device.yaml"' "$partita" "$out/slowdown"
# Four ranks, one plan of each kind.
four=(--micro-batch 1 --global-batch 4 --steps 2 --backend cuda --json --share-gpu --ranks 4 --transport tcp --timeout 30)
part nccl-4-tp2-dp2 60 checked "$partita" run "$files/gpt-small.yaml" "${four[@]}" --tp 2 --dp 2 --sequence-parallel
part nccl-4-pp2-dp2 60 checked "$partita" run "$files/gpt-small.yaml" "${four[@]}" --pp 2 --dp 2
part nccl-4-zero3 60 checked "$partita" run "$files/gpt-small.yaml" "${four[@]}" --dp 4 --zero 3
part nccl-4-cp2-dp2 60 checked "$partita" run "$files/gpt-small.yaml" "${four[@]}" --cp 2 --dp 2
# One of them is killed in its second step: the others, whose communicators are several, end and say so.
part nccl-4-a-rank-dies 60 bash -c 'PARTITA_TEST_FAULT=2:1:4:kill "$@"; [ $? -eq 3 ] && echo "the others ended"' - "$partita" run "$files/gpt-small.yaml" "${four[@]}" --tp 2 --dp 2
# What NCCL expects, pair by pair, beside our model of it.
part nccl-estimates 120 "$partita" validate --backend cuda --ranks 2 --share-gpu --transport tcp --timeout 30 --only 'gpt dp 2' --calibrate-only collectives --no-reference --rounds 1 --steps 1 --out "$out/estimates" --json
part mnist 30 checked "$partita" run mnist-linear --backend cuda --steps 20 --json
# A tool that is not there is a part that has shown nothing.
one=(--micro-batch 2 --global-batch 2 --backend cuda --steps 1 --no-check)
# Each of fp32, bf16 with our own attention, fp8 and experts; and attention's kernels by themselves, at their edges. What a library only
# tries (a call that is refused) is no error of ours.
for tool in racecheck memcheck; do
  sanitizer=(compute-sanitizer --tool $tool --error-exitcode 1)
  [ $tool = memcheck ] && sanitizer+=(--report-api-errors no)
  # Hazards inside of a library's kernels are not ours to judge, and to look for them takes longer than all else.
  [ $tool = racecheck ] && sanitizer+=(--kernel-name kns=partita)
  part $tool-flash 90 env PARTITA_CUDA_FLASH=own "${sanitizer[@]}" "$gpu_test" --gtest_filter=Gpu.FlashAttentionEqualsTheReferencesInBf16
  part $tool-bf16 50 env PARTITA_CUDA_FLASH=own "${sanitizer[@]}" "$partita" run "$files/gpt-small.yaml" "${one[@]}" --precision bf16
  # Some virtual machines have no device for it: ten parts would say so, one does.
  grep -qs 'not supported' "$out/$tool-bf16.txt" && break
  part $tool 50 "${sanitizer[@]}" "$partita" run "$files/gpt-small.yaml" "${one[@]}"
  part $tool-experts 50 "${sanitizer[@]}" "$partita" run "$files/experts-small.yaml" "${one[@]}" --precision bf16
  part $tool-fp8 50 "${sanitizer[@]}" "$partita" run "$files/gpt-small.yaml" "${one[@]}" --precision fp8
done
echo "$(($(date +%s) - began)) s, ${#failed[@]} failed: ${failed[*]:-none}" | tee -a "$out/summary.txt"
echo "${#left_out[@]} found no time: ${left_out[*]:-none}" | tee -a "$out/summary.txt"
archive
[ ${#failed[@]} -gt 0 ] && exit 1
[ ${#left_out[@]} -gt 0 ] && exit 3
exit 0
