#!/usr/bin/env bash
# Applies each mutant of list.txt to a copy of the committed source, builds the test that must catch
# it and expects that test to fail. Prints one line per mutant; exit code 1 if one survives.
#
#   tests/mutants/run.sh [NAME...]      all mutants, or those named
#   tests/mutants/run.sh --check        no more than whether each still has its place in the source
#
# The copy and its build folder stay in PARTITA_MUTANTS_DIR (default: a new temporary folder, removed
# at the end), so that a second run only rebuilds what changed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
list=$root/tests/mutants/list.txt
if [[ ${1:-} == --check ]]; then
  exec perl -e '
    my ($root, $list) = @ARGV;
    my ($name, $file, $stale, $all) = ("", "", 0, 0);
    open my $in, "<", $list or die "$list: $!\n";
    while (<$in>) {
      chomp;
      $name = $1 if /^name: (.*)/;
      $file = $1 if /^file: (.*)/;
      next unless /^from: (.*)/;
      my ($from, $n, $text) = ($1, 0, "");
      if (open my $at, "<", "$root/$file") { local $/; $text = <$at>; $n = () = $text =~ /\Q$from\E/g }
      ++$all;
      next if $n == 1;
      print "$name: its text occurs $n times in $file; update $list\n";
      $stale = 1;
    }
    print "$all mutants\n";
    exit $stale;' "$root" "$list"
fi
if [[ -n ${PARTITA_MUTANTS_DIR:-} ]]; then
  work=$PARTITA_MUTANTS_DIR
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
copy=$work/source
mkdir -p "$copy"
# Only files that differ are replaced: a build folder from an earlier run stays up to date.
fresh=$work/fresh
rm -rf "$fresh" && mkdir -p "$fresh"
git -C "$root" archive HEAD | tar -x -C "$fresh"
(cd "$fresh" && find . -type f -print0 | while IFS= read -r -d '' f; do
  cmp -s "$f" "$copy/$f" || { mkdir -p "$(dirname "$copy/$f")" && cp "$f" "$copy/$f"; }
done)
(cd "$copy" && cmake --preset dev -B "$work/build" >"$work/configure.log")

build() { nice ninja -C "$work/build" -j1 "$1" >"$work/build.log" 2>&1; }

survived=0
run_one() {
  local name=$1 file=$2 from=$3 to=$4 test=$5 filter=$6
  local at=$copy/$file
  cp "$at" "$work/original"
  if ! FROM=$from TO=$to perl -0777 -i -pe '
      my $n = () = /\Q$ENV{FROM}\E/g; die "the original text occurs $n times\n" if $n != 1;
      s/\Q$ENV{FROM}\E/$ENV{TO}/' "$at"; then
    echo "$name: STALE, $file has changed; update list.txt"
    survived=1
  elif ! build "$test"; then
    echo "$name: DOES NOT BUILD, see below"
    grep -m 3 error "$work/build.log" || true
    survived=1
  elif local binary && binary=$(find "$work/build" -name "$test" -type f -perm -u+x | head -1) &&
      timeout 120 "$binary" --gtest_filter="$filter" >"$work/run.log" 2>&1; then
    if grep -q '^\[  SKIPPED \]' "$work/run.log"; then
      echo "$name: not tried, $test skips $filter here"
    else
      echo "$name: SURVIVED $test $filter"
      survived=1
    fi
  else
    echo "$name: caught by $test, $(grep -c '^\[  FAILED  \].* (' "$work/run.log" || true) failing"
  fi
  cp "$work/original" "$at"
}

# Without a mutant its test must pass, or failing would prove nothing.
passes_unchanged() {
  local test=$1 filter=$2 binary
  build "$test" || { cat "$work/build.log" && exit 3; }
  binary=$(find "$work/build" -name "$test" -type f -perm -u+x | head -1)
  "$binary" --gtest_filter="$filter" >"$work/run.log" 2>&1 || {
    echo "$test $filter fails without any mutant" && exit 3
  }
}

for_each_mutant() {
  local action=$1 line name='' file='' from='' to='' test=''
  shift
  while IFS= read -r line || [[ -n $line ]]; do
    case $line in
      '#'* | '') continue ;;
      'name: '*) name=${line#name: } ;;
      'file: '*) file=${line#file: } ;;
      'from: '*) from=${line#from: } ;;
      'to: '*) to=${line#to: } ;;
      'test: '*) test=${line#test: } ;;
      'filter: '*)
        [[ $# -eq 0 || " $* " == *" $name "* ]] || continue
        if [[ $action == check ]]; then
          passes_unchanged "$test" "${line#filter: }"
        else
          run_one "$name" "$file" "$from" "$to" "$test" "${line#filter: }"
        fi
        ;;
      *) echo "$list: what is '$line'?" && exit 2 ;;
    esac
  done <"$list"
}
for_each_mutant check "$@"
for_each_mutant run "$@"
exit $survived
