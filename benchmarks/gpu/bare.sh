#!/usr/bin/env bash
# Install what a bare GPU image lacks from the folder that `make gpu-wheels` filled, without a network, leaving what is there
# as it is:  bash benchmarks/gpu/bare.sh [FOLDER]
set -euo pipefail
wheels=${1:-build/gpu-wheels}
for wheel in "$wheels"/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1)
    if ! python3 -m pip show -q "$name" >/dev/null 2>&1; then
        python3 -m pip install -q --no-index --no-deps "$wheel"
        echo "installed $name"
    fi
done
python3 -c 'import deepspeed, torch; print("deepspeed", deepspeed.__version__, "torch", torch.__version__, torch.cuda.is_available())'
