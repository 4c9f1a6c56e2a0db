#!/usr/bin/env bash
# Serve a model directory with the vLLM of .venv-vllm, on loopback, offline.
#
#   scripts/vllm/serve.sh MODEL_DIR NAME PORT [more `vllm serve` arguments, which win over ours]
#
# SWARMX_VLLM_CPUS     cores to run on: "0-1", "0", "1", or "nobind" to let the kernel decide, which
#                      is right for several replicas on one host (default: every allowed core)
# SWARMX_VLLM_KV_GIB   KV cache in GiB (default: 1, about 87,000 tokens of the 0.5B, half in float32)
# SWARMX_VLLM_DTYPE    bfloat16 or float32 (default: bfloat16 where the CPU has AVX-512, else float32)
# SWARMX_VLLM_PRELOAD  0 leaves the faster allocator and OpenMP library out (default: 1)
set -euo pipefail

die() { printf '[serve] error: %s\n' "$*" >&2; exit 1; }

(($# >= 3)) || die "got $# arguments, expected MODEL_DIR NAME PORT [vllm arguments]"
model=$1 name=$2 port=$3
shift 3
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$root/.venv-vllm

[[ -x $venv/bin/vllm ]] || die "$venv/bin/vllm is missing: run make setup-vllm first"
[[ -f $model/config.json ]] ||
  die "$model/config.json is missing, expected a Hugging Face model directory: run make setup-vllm first"
[[ $port =~ ^[0-9]+$ ]] && ((port >= 1 && port <= 65535)) || die "port '$port': expected 1 to 65535"

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=${SWARMX_VLLM_KV_GIB:-1}

# vLLM's own default, "auto", puts every server on core 0: say what is meant instead.
cpus=${SWARMX_VLLM_CPUS:-$(awk '/^Cpus_allowed_list/ { print $2 }' /proc/self/status)}
export VLLM_CPU_OMP_THREADS_BIND=$cpus
[[ $cpus != nobind ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Without AVX-512 every bf16 product is emulated: measured six times slower than float32 at prefill
# and three times at decode. The price of float32 is twice the memory for weights and KV cache.
if grep -qw avx512f /proc/cpuinfo; then dtype=bfloat16; else dtype=float32; fi
dtype=${SWARMX_VLLM_DTYPE:-$dtype}

if [[ ${SWARMX_VLLM_PRELOAD:-1} != 0 ]]; then
  for lib in "$venv"/tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4 "$venv/lib/libiomp5.so"; do
    [[ ! -e $lib ]] || export LD_PRELOAD=${LD_PRELOAD:+$LD_PRELOAD:}$lib
  done
fi

# disable_any_whitespace: a small greedy model otherwise fills a JSON answer with blanks up to
# max_tokens; it needs the backend named. Chunked prefill is off because one chunk of a request with
# a seed kills a CPU engine ("CPU Generator does not use offset"). Blocks of 32 tokens, not 128, let
# the prefix cache find short system prompts. The plugin reads tool calls written without tags.
exec "$venv/bin/vllm" serve "$model" --served-model-name "$name" \
  --host 127.0.0.1 --port "$port" \
  --dtype "$dtype" --max-model-len 4096 --max-num-seqs 8 --enforce-eager \
  --no-enable-chunked-prefill --max-num-batched-tokens 4096 --block-size 32 \
  --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' \
  --enable-auto-tool-choice --tool-call-parser raw_json \
  --tool-parser-plugin "$root/scripts/vllm/raw_json_tool_parser.py" \
  "$@"
