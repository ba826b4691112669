#!/usr/bin/env bash
# Start a script on this machine under DeepSpeed: on all GPUs, or on CPU ranks where there are none.
#   launch/local.sh launch/pretrain.py --config configs/quickstart.yaml key=value ...
# CPU_RANKS (default: 2, or 1 on a single core) sets the number of CPU ranks. The port is any free one.
set -euo pipefail
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
ranks=()
if [ "${DS_ACCELERATOR:-}" = cpu ] || ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    export DS_ACCELERATOR=cpu
    ranks=(--num_gpus "${CPU_RANKS:-$((cores < 2 ? 1 : 2))}")
fi
exec "$python" -m deepspeed.launcher.runner --log_level error --master_port "$port" "${ranks[@]}" "$@"
