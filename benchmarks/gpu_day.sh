#!/usr/bin/env bash
# The first day on a GPU, in less than 25 minutes: `benchmarks/gpu_day.sh --help`. Takes vLLM and this package, and no
# network if the model is there. Call it again to go on where time was over; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_day.py "$@"
