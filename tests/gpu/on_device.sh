#!/usr/bin/env bash
# All that a GPU can show, in one run of at most six minutes, on a machine without a package index.
# Usage: bash tests/gpu/on_device.sh collect FOLDER           wheels of what such a machine lacks, for Python 3.12
#        bash tests/gpu/on_device.sh run [FOLDER] [ARGUMENTS]  install those of FOLDER (- for none), then measure
# ARGUMENTS are those of on_device.py: --out FOLDER, --small, --seconds N, --parts NAME,NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python3}
# There already, as in any image with torch and its surroundings; `test_on_device.py` checks that the three lists
# together have all that the package requires. What the tracking server alone needs (Flask and the like) stays away:
# runs are tracked in a database here.
PRESENT=(
    torch torchvision torchaudio triton transformers timm huggingface_hub safetensors numpy scipy scikit-learn pandas
    matplotlib pillow requests pyyaml psutil markupsafe packaging protobuf certifi urllib3 charset-normalizer
    anyio h11 httpcore pygments markdown-it-py annotated-doc tqdm einops msgpack ninja py-cpuinfo
    pytest pytest-xdist pytest-timeout
)
WHEELS=(
    pydantic pydantic_core annotated-types typing-inspection typing-extensions
    webdataset braceexpand submitit cloudpickle tenacity hjson click filelock
    mlflow-skinny sqlalchemy alembic mako sqlparse cachetools databricks-sdk google-auth
    pyasn1 pyasn1-modules cryptography cffi pycparser
    opentelemetry-api opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions
    importlib_metadata zipp python-dotenv gitpython gitdb smmap fastapi starlette uvicorn rich jinja2 fsspec
    httpx2 httpcore2 truststore idna av
)
BUILT=(deepspeed)  # from source, without its compiled operations: they are made where they run, or not at all

collect() {
    local folder=$1 versions
    mkdir -p "$folder"
    versions=$("$PYTHON" -m pip list --format=freeze)
    pinned() { grep -i "^${1//[-_]/[-_]}==" <<< "$versions" || echo "$1"; }
    for name in "${WHEELS[@]}"; do
        "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
            --platform manylinux_2_34_x86_64 \
            --dest "$folder" "$(pinned "$name")"
    done
    for name in "${BUILT[@]}"; do
        DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$(pinned "$name")"
    done
    find "$folder" -name '*.whl' -size +1M -exec "$PYTHON" -m tests.gpu.repack {} +
    du -sh "$folder"
}

run() {
    local wheels=${1:--} site
    shift || true
    if [ "$wheels" != - ]; then
        site=$(mktemp -d)
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
            "$wheels"/*.whl
        "$PYTHON" -m compileall -q -j 0 "$site" avcil_dist data_shards launch > /dev/null || true  # once, by all cores
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    # A machine without a network may not find itself by its name.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
    exec "$PYTHON" -m tests.gpu.on_device "$@"
}

command=${1:?collect or run}
shift
"$command" "$@"
