python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl 2>&1 | grep -v WARN
export PYTHONPATH=$PWD:/tmp/site PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
T0=$(date +%s); say() { echo "== $(( $(date +%s) - T0 )) s: $*"; }
