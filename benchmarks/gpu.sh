#!/usr/bin/env bash
# The checks that need a GPU: the tests marked so, then the zoo. A host without network needs a python3 with torch, pytest and setuptools, and
# .tvmpack here: TVM and the other dependencies as installed packages, in archives (*.tar.xz) that are unpacked into one folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c "import tvm" 2>/dev/null; then
  mkdir -p build/site
  for part in .tvmpack/*.tar.xz; do tar -xJf "$part" -C build/site; done
  export PYTHONPATH="$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}" TVM_CUDA_COMPILE_MODE=nvcc
fi
"$python" -c "import thresher" 2>/dev/null ||
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
"$python" -m pytest -m gpu tests
"$python" benchmarks/zoo.py --device cuda --dtypes float32 float16 --batches 1 8 --against eager torch.compile max-autotune
