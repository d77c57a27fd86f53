#!/usr/bin/env bash
# Compares with PyTorch on this machine and writes down what came out: validation/results/cpu/pytorch/
#   operators.csv  every operator, pass and precision: the difference nearest its bound, and the bound
#   networks.csv   loss, gradients and parameters of networks, optimizers, DDP and FSDP
#   steps.csv      our measured step beside PyTorch's
#   about.txt      command, commit, date, versions, machine
#
#   validation/record_pytorch.sh [FOLDER]
#
# PARTITA_PYTORCH names a Python with torch (docs/execution.md, "Against PyTorch"). The tests are built as the
# command is, -O2; keep the machine quiet while they run. Exit code 1 if a comparison fails, 3 without torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=${1:-$root/validation/results/cpu/pytorch}
build=$root/build/pytorch
cd "$root"
mkdir -p "$results" "$build"
cmake --preset release -B "$build" -DPARTITA_TESTS=ON >"$build/configure.log" || { cat "$build/configure.log"; exit 3; }
cmake --build "$build" --target pytorch_test
test=$build/tests/runtime/pytorch_test

rm -f "$results"/{operators,networks,steps}.csv
status=0
PARTITA_PYTORCH_RESULTS=$results "$test" --gtest_brief=1 >"$build/run.log" 2>&1 || status=1
grep -E '^\[  (FAILED|SKIPPED)' "$build/run.log" || true
grep -h ' ms (quartiles' "$build/run.log" || true
[[ -s $results/operators.csv ]] || { cat "$build/run.log" && exit 3; }
{
  echo "command: validation/record_pytorch.sh"
  echo "commit: $(git describe --always --dirty --exclude '*')"
  echo "date: $(date -u +%F)"
  echo "torch: $(tail -n 1 "$results/operators.csv" | cut -d , -f 7)"
  echo "compiler: $(c++ --version | head -n 1), -O2"
  echo "machine: $(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(uname -sm)"
  echo "tests failed: $status"
} >"$results/about.txt"
exit $status
