"""Every kernel once on a GPU, for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m ham.kernels.sanitize [OPERATION...]

Each operation runs forward and backward on random inputs with odd lengths, and every launch of the
static gate's default set runs on a GPU of its own target, so that no tile that is chosen there is
left out. torch's pool is off: within it a write past the end of a tensor hits no boundary.
"""

from __future__ import annotations

import importlib
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from ham.errors import unknown_choice
from ham.kernels.convolved_heads.cases import ConvolvedHeadsCase
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase
from ham.kernels.gated_sum.cases import GatedSumCase
from ham.kernels.registry import find_operation
from ham.kernels.routed_attention.cases import RoutedAttentionCase
from ham.kernels.ssd.cases import SsdCase
from ham.kernels.verify import Case, run_with_gradients

CASES: dict[str, tuple[Case, ...]] = {
    "gated_delta_rule": (
        GatedDeltaRuleCase(2, 200, 2, 128, 128),
        GatedDeltaRuleCase(1, 321, 2, 64, 64, initial_state=True),
        GatedDeltaRuleCase(1, 150, 2, 64, 32, initial_state=True, lengths=(64, 0, 1, 85)),
    ),
    "ssd": (
        SsdCase(2, 200, 2, 64, 128, groups=1),
        SsdCase(1, 321, 2, 128, 64, groups=2, initial_state=True),
    ),
    "routed_attention": (
        RoutedAttentionCase(3, 333, 2, 128, 128, ragged=True),
        RoutedAttentionCase(2, 200, 4, 64, 64, key_heads=2, window=70, sink=True, score=True),
    ),
    "convolved_heads": (ConvolvedHeadsCase(2, 333, 3, 64, 64),),
    "gated_sum": (GatedSumCase(2, 333, 3, 64),),
    "decode": (),
}


def run(operation: str, device: torch.device) -> int:
    """Launch everything of one operation; returns how many calls were made."""
    calls = 0
    for case in CASES[operation]:
        found = find_operation(operation)
        inputs = case.inputs(torch.bfloat16, device, seed=0)
        run_with_gradients(found, "triton", inputs, torch.bfloat16)
        calls += 1
    module = importlib.import_module(f"ham.kernels.{operation}.compile_cases")
    for case in module.COMPILE_CASES:
        if case.default:
            with device:
                case.launch()
            calls += 1
    torch.cuda.synchronize(device)
    return calls


def main(names: list[str]) -> int:
    """Run the operations named, or all."""
    for name in names:
        if name not in CASES:
            raise unknown_choice("operation", name, CASES)
    device = torch.device("cuda")
    for name in names or CASES:
        print(f"{name}: {run(name, device)} calls", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
