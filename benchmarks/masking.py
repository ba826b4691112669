"""What masking costs beside a training step: `python benchmarks/masking.py [--device cuda]`.

Times each policy on 64 x 512 tokens at 30 %, and a forward and backward pass of the quickstart
encoder on the same batch. Prints one line of JSON: milliseconds, and the largest share of the step that masking takes.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlm_dist import masking, schema  # noqa: E402
from mlm_dist.cpu_products import use_faster_library  # noqa: E402
from mlm_dist.encoder import Encoder, EncoderConfig  # noqa: E402
from mlm_dist.mlm import MLM  # noqa: E402

ROWS, LENGTH, VOCAB_SIZE, RATE = 64, 512, 4096, 0.3
SPECIALS = {"mask_token_id": 4, "pad_token_id": 0, "mask_ignore_token_ids": [1, 2, 3]}


def median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of `run` in milliseconds, after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20, help="of a masking; a step is repeated twice")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    use_faster_library()  # as a run on a CPU does
    recipe = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    shape = schema.from_mapping(EncoderConfig, recipe["model"]["encoder"])
    ids = torch.randint(5, VOCAB_SIZE, (ROWS, LENGTH), device=device)
    segments = torch.arange(LENGTH, device=device).expand(ROWS, -1) // 128 + 1
    keys = masking.row_keys_by_rank(0, 0, 0, 0, ROWS, device)
    starts = torch.arange(VOCAB_SIZE) % 3 > 0

    def model(policy: str) -> MLM:
        encoder = Encoder(shape, VOCAB_SIZE)
        words = {"num_tokens": VOCAB_SIZE, "random_token_prob": 0.1, "policy": policy, "word_starts": starts}
        return MLM(encoder, RATE, **words, **SPECIALS).to(device)

    mask_ms = {}
    for policy in masking.POLICIES:
        masker = model(policy).masker
        mask_ms[policy] = median_ms(lambda m=masker: m(ids, keys, RATE, segments), arguments.repeats, device)
    mlm = model("token")
    step_ms = median_ms(lambda: mlm(ids, row_keys=keys, segments=segments).backward(), 2, device)
    result = {
        "benchmark": "masking",
        "tokens": [ROWS, LENGTH],
        "rate": RATE,
        "mask_ms": {policy: round(ms, 2) for policy, ms in mask_ms.items()},
        "forward_backward_ms": round(step_ms, 1),
        "share_percent": round(100 * max(mask_ms.values()) / step_ms, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
