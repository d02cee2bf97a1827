#!/usr/bin/env bash
# All the CPU benchmarks, about fifteen minutes on two cores: tables, and JSON lines in a file.
#
#     bash tests/benchmarks/run.sh [FILE]
#
# A benchmark that fails is named at the end, and the others run.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..:$here/..${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python} json=() failed=()
[ $# -eq 0 ] || json=(--json "$(realpath "$1")")

bench() {
  "$python" "$here/bench_$1.py" "${@:2}" ${json[@]+"${json[@]}"} || failed+=("$1")
}

bench train --repeats 2
bench captions --batches 1 8 --growth 1 3 5 10 --repeats 2
bench captions --batches 32 --growth --questions 32 --repeats 1
bench features --images 96
bench features --images 1024 --repeats 1 --small
bench features --images 128 --repeats 1 --small --random --vision vit_base_patch16_clip_quickgelu_224.openai
bench search --rows 10000 100000 500000
bench decode --images 8 --repeats 1
bench metrics --images 2000
bench recall --images 20000 --texts 100000
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
