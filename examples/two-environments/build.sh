#!/usr/bin/env bash
# Calibrates here, where ModelOpt is, and builds the engine inside TensorRT-LLM's container, where it is not needed: the
# two pin different versions of ModelOpt and transformers.
#   examples/two-environments/build.sh RECIPE OUT [tensorrt|pytorch]
set -euo pipefail
recipe=${1:?name a recipe} out=${2:?name the directory to write} backend=${3:-tensorrt}
image=${IMAGE:-twofour-tensorrt-llm:1.2.1}

twofour build "$recipe" --set "engine.backend=$backend" --until checkpoint --out "$out"

case $backend in
  tensorrt) checkpoint=$out/checkpoint-trtllm ;;
  pytorch) checkpoint=$out/checkpoint ;;
  *) echo "'$backend' is neither tensorrt nor pytorch" >&2; exit 2 ;;
esac
twofour verify "$checkpoint"

# Beside OUT, which holds what its manifest lists and nothing else.
out=$(cd "$out" && pwd)
engine=$out-$backend/engine
mkdir -p "$out-$backend"
docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$out:$out:ro" -v "$out-$backend:$out-$backend" "$image" \
  twofour engine "$out/$(basename "$checkpoint")" --backend "$backend" --out "$engine"
echo "serve it in the same image: $engine/launch/serve.sh"
