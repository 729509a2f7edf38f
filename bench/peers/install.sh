#!/usr/bin/env bash
# Make bench/peers/.venv-NAME for one peer, or for all of them: install.sh [hqq|autoround|gptqmodel|llamacpp]
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "install.sh: $1" >&2; exit 1; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT

step() { # step TEXT COMMAND...: one line, and the command's own words only if it fails
  echo "$1"
  "${@:2}" >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "$1: failed, its last lines stand above."; }
}

install() {
  local name=$1 pip=.venv-$1/bin/pip stamp=.venv-$1/.done
  [ ! -e "$stamp" ] || { echo "$name: already installed"; return; }
  [ -x "$pip" ] || step "$name: virtual environment" "${PYTHON:-python3}" -m venv ".venv-$name"
  # torch first and by version: it has a build for processors, later ones bring gigabytes for accelerators
  step "$name: torch" "$pip" install torch==2.13.0
  step "$name: transformers" "$pip" install torch==2.13.0 transformers==5.23.0 safetensors accelerate
  case $name in
    hqq) step "hqq: hqq" env DISABLE_CUDA=1 "$pip" install torch==2.13.0 hqq==0.2.8.post1 ;;
    autoround) step "autoround: auto-round" "$pip" install torch==2.13.0 auto-round==0.16.1 ;;
    gptqmodel)
      # it names torch 2.14.1 and runs on 2.13: the package alone, then what it names apart from torch
      step "gptqmodel: gptqmodel" "$pip" install --no-deps gptqmodel==7.7.0
      ".venv-$name/bin/python" - >".venv-$name/needs.txt" <<'PYTHON' || fail "could not read what gptqmodel needs."
import importlib.metadata
import re

for line in importlib.metadata.requires("gptqmodel"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] != "torch":
        print(line)
PYTHON
      step "gptqmodel: its dependencies" "$pip" install torch==2.13.0 -r ".venv-$name/needs.txt"
      ;;
    llamacpp)
      local flags="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
      if grep -q avx512_bf16 /proc/cpuinfo; then
        flags+=" -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
      fi
      step "llamacpp: llama-cpp-python, from source (10 minutes)" \
        env CMAKE_ARGS="$flags" CMAKE_BUILD_PARALLEL_LEVEL=2 "$pip" install llama-cpp-python==0.3.36
      step "llamacpp: gguf" "$pip" install gguf==0.19.0
      ;;
  esac
  touch "$stamp"
  echo "$name: ready"
}

for name in "${@:-hqq autoround gptqmodel llamacpp}"; do
  for each in $name; do
    case $each in
      hqq | autoround | gptqmodel | llamacpp) install "$each" ;;
      *) fail "no peer is called $each; take one of hqq, autoround, gptqmodel, llamacpp." ;;
    esac
  done
done
