"""Other people's implementations of the operations, as providers to be measured against.

Nothing is imported from their packages before they are called, so that this package loads on any
machine. What a peer cannot do is a sentence from its `limits`, which a speed row then carries.

| operation | provider | what it calls |
| --- | --- | --- |
| gated_delta_rule | `fla` | `fla.ops.gated_delta_rule.chunk_gated_delta_rule`, its Triton kernels |
| gated_delta_rule | `flash_qla` | the same function with FLA's dispatch to FlashQLA (TileLang) |
| ssd | `fla` | `fla.ops.simple_gla.chunk_simple_gla` on q = c, k = b, v = dt x, g = dt a |
| ssd | `mamba_ssm` | `mamba_chunk_scan_combined` |
| routed_attention | `flex` | FlexAttention over packed keys, packing included |
| routed_attention | `flex_masked` | FlexAttention over all keys with a mask |
| routed_attention | `sdpa_cudnn`, `sdpa_flash` | dense causal attention over all keys |
"""

from __future__ import annotations

# Operations register themselves first; peers are added to them.
from ham.kernels import gated_delta_rule as _gated_delta_rule  # noqa: F401
from ham.kernels import routed_attention as _routed_attention  # noqa: F401
from ham.kernels import ssd as _ssd  # noqa: F401
from ham.kernels.peers import fla, flex, mamba, sdpa
from ham.kernels.registry import register_provider

for _provider in fla.GATED_DELTA_RULE:
    register_provider("gated_delta_rule", _provider)
for _provider in (fla.SSD, mamba.SSD):
    register_provider("ssd", _provider)
for _provider in (*flex.ROUTED_ATTENTION, *sdpa.ROUTED_ATTENTION):
    register_provider("routed_attention", _provider)
