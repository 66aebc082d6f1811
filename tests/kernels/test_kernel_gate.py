"""The static gate: what it notices, what it explains, and what it lets pass.

Kernels are compiled in worker processes. Nothing here imports Triton, since tests in the same
process want it as an interpreter.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ham.cli import main
from ham.errors import ConfigError
from ham.kernels.gate.pool import WorkerProcess, clean_environment
from ham.kernels.gate.run import GateResult, case_modules, compile_cases, judge
from ham.kernels.gate.snapshot import Entry, read_snapshot, snapshot_path, write_snapshot
from ham.kernels.gate.targets import parse_targets

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
HOPPER = parse_targets("sm_90")

TOY = """
import torch
import triton
import triton.language as tl
from ham.kernels.compile_cases import CompileCase

PRODUCT = "{product}"
STAGES = {stages}
WARPS = {warps}


@triton.jit
def product_kernel(p_a, p_b, p_o, PRODUCT: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(p_a + o), tl.load(p_b + o)
    if PRODUCT == "dot":
        c = tl.dot(a, b)
    else:
        c = tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :] + 1, 1) - 16
    tl.store(p_o + o, c)


@triton.jit
def loop_kernel(p_a, p_b, p_o, K, STAGES: tl.constexpr):
    o_m = tl.arange(0, 128)
    o_k = tl.arange(0, 64)
    acc = tl.zeros([128, 128], tl.float32)
    for i in tl.range(0, K, 64, num_stages=STAGES):
        a = tl.load(p_a + o_m[:, None] * 4096 + i + o_k[None, :])
        b = tl.load(p_b + o_m[:, None] * 4096 + i + o_k[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(p_o + o_m[:, None] * 128 + o_m[None, :], acc)


@triton.heuristics({{"SIZE": lambda args: 128}})
@triton.jit
def outer_kernel(p_a, p_o, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    a = tl.load(p_a + o)
    c = tl.exp(a[:, None] * a[None, :])
    c = c / tl.sum(c, 0)[None, :] + tl.sum(c, 1)[:, None]
    tl.store(p_o + o[:, None] * SIZE + o[None, :], c)


def product():
    a = torch.zeros(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, a, torch.zeros(16, 16), PRODUCT=PRODUCT)


def loop():
    a = torch.zeros(128, 4096, dtype=torch.bfloat16)
    loop_kernel[(1,)](a, a, torch.zeros(128, 128), 4096, STAGES=STAGES)


def outer():
    outer_kernel[(1,)](torch.zeros(128), torch.zeros(128, 128), num_warps=WARPS)


COMPILE_CASES = (
    CompileCase("product", product), CompileCase("loop", loop), CompileCase("outer", outer)
)
"""

BROKEN = """
import os

import torch
import triton
import triton.language as tl
from ham.kernels.compile_cases import CompileCase
from ham.kernels.triton_target import target_of


@triton.jit
def number_kernel(n):
    tl.device_print("n", n)


@triton.jit
def wrong_kernel(p_a):
    tl.store(p_a + tl.arange(0, 3), 0.0)


@triton.jit
def twice_summed_kernel(p_a, p_o):
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(p_o, tl.sum(tl.sum(tl.dot(tl.load(p_a + o), tl.load(p_a + o)), 1), 0))


def twice_summed():
    if target_of(torch.device("cpu")).capability == (10, 0):
        a = torch.zeros(64, 64, dtype=torch.bfloat16)
        twice_summed_kernel[(1,)](a, torch.zeros(1))


@triton.autotune([triton.Config({"N": 32}), triton.Config({"N": 64}, num_warps=8)], key=[])
@triton.jit
def tuned_kernel(p_a, N: tl.constexpr):
    tl.store(p_a + tl.arange(0, N), 0.0)


def ampere():
    if target_of(torch.device("cpu")).capability == (8, 0):
        tuned_kernel[(1,)](torch.zeros(64), maxnreg=64)


def unlucky():
    if target_of(torch.device("cpu")).capability == (9, 0):
        raise TypeError("no such tile")


COMPILE_CASES = (
    CompileCase("scalars", lambda: number_kernel[(1,)](3)),
    CompileCase("nothing", lambda: None),
    CompileCase("wrong", lambda: wrong_kernel[(1,)](torch.zeros(3))),
    CompileCase("raises", unlucky),
    CompileCase("for Ampere", ampere),
    CompileCase("twice summed", twice_summed),
    CompileCase("tuned", lambda: tuned_kernel[(1,)](torch.zeros(64))),
    CompileCase("tuned again", lambda: tuned_kernel[(1,)](torch.zeros(64))),
    CompileCase("twin", ampere),
    CompileCase("twin", ampere),
    CompileCase("seldom", lambda: os._exit(7), default=False),
)
"""


def compile_toys(folder: Path, **mutation: object) -> GateResult:
    """The toy kernels, which differ from the healthy ones by `mutation`, compiled for Hopper."""
    text = TOY.format(**{"product": "dot", "stages": 2, "warps": 16, **mutation})
    (folder / "toy_cases.py").write_text(text)
    return compile_cases(["toy_cases"], HOPPER, jobs=1, path=[folder])


def judged(result: GateResult, folder: Path, *, update: bool = False) -> tuple[str, str]:
    """Failures and notices about a copy of `result`."""
    result = copy.deepcopy(result)
    judge(result, folder, update=update)
    return "\n".join(result.failures), "\n".join(result.notices)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> GateResult:
    return compile_toys(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> GateResult:
    folder = tmp_path_factory.mktemp("mutated")
    return compile_toys(folder, product="sums", stages=8, warps=1)


@needs_triton
def test_mutated_kernels_fail(healthy: GateResult, mutated: GateResult, tmp_path: Path) -> None:
    failures, notices = judged(healthy, tmp_path, update=True)
    assert failures == "" and "wrote" in notices
    assert judged(healthy, tmp_path) == ("", "")
    failures, _ = judged(mutated, tmp_path)
    assert "product on sm_90: product_kernel has 0 HMMA matrix instructions, 1 before" in failures
    assert "loop on sm_90: loop_kernel takes 262144 bytes of shared memory, sm_90 has" in failures
    assert re.search(r"product_kernel takes \d+ registers a thread, \d+ before", failures)
    assert "outer on sm_90: outer_kernel spills" in failures
    assert "0 and 0 before: it loses time wherever that happens in a loop" in failures


@needs_triton
def test_improvement_passes_with_a_notice(healthy: GateResult, tmp_path: Path) -> None:
    worse = {
        entry: {**figures, "registers": figures["registers"] + 50}
        for entry, figures in healthy.figures.items()
    }
    del worse[Entry("toy_cases", "product", "sm_90", "product_kernel")]
    stale = Entry("toy_cases", "forgotten", "sm_90", "old_kernel")
    path = snapshot_path(healthy.triton, tmp_path)
    write_snapshot(path, healthy.triton, {**worse, stale: {}})
    failures, notices = judged(healthy, tmp_path)
    assert failures == ""
    assert "toy_cases, outer on sm_90: outer_kernel takes" in notices
    assert "toy_cases, product on sm_90: product_kernel is not in the snapshot" in notices
    assert "forgotten on sm_90: old_kernel is in the snapshot, but no longer launched" in notices
    assert "store the new state: the same command with --update" in notices
    judged(healthy, tmp_path, update=True)
    assert read_snapshot(path) == healthy.figures


@needs_triton
def test_unknown_version_passes_but_limits_hold(
    healthy: GateResult, mutated: GateResult, tmp_path: Path
) -> None:
    write_snapshot(snapshot_path("0.0.1", tmp_path), "0.0.1", {})
    failures, notices = judged(healthy, tmp_path)
    assert failures == "" and "no snapshot for Triton" in notices
    failures, _ = judged(mutated, tmp_path)
    assert "shared memory" in failures and len(failures.splitlines()) == 1


@needs_triton
def test_broken_cases_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken_cases.py").write_text(BROKEN)
    targets = parse_targets("sm_90,sm_100,gfx942")
    result = compile_cases(["broken_cases"], targets, jobs=1, path=[tmp_path])
    text = "\n".join(result.failures)
    assert "scalars cannot be launched on sm_90: ValueError: number_kernel is launched w" in text
    assert "nothing launches no kernel on sm_90, sm_80, sm_100, gfx942" in text
    assert "raises cannot be launched on sm_90: TypeError: no such tile" in text
    assert "wrong on sm_90: wrong_kernel does not compile" in text and "power of 2" in text
    if result.triton in ("3.6.0", "3.7.1"):
        line = next(line for line in result.failures if "twice summed" in line)
        assert "parent layout must" in line and line.endswith("tl.sum(v[None, :], 1)")
        result.failures.remove(line)
    assert "twin is the name of more than one case" in text
    assert len(result.failures) == 7, "the wrong kernel fails on each of three targets"
    kernels = {entry.kernel for entry in result.figures if entry.case == "tuned"}
    assert kernels == {"tuned_kernel", "tuned_kernel #2"}
    assert result.compilations == 8, "equal launches are compiled once"


@needs_triton
def test_a_crashing_compiler_is_an_answer_and_the_next_question_works(tmp_path: Path) -> None:
    (tmp_path / "broken_cases.py").write_text(BROKEN)
    worker = WorkerProcess(["broken_cases"], [tmp_path])
    request = {"do": "compile", "operation": "broken_cases", "target": "sm_90", "index": 0}
    try:
        assert "status 7" in worker.ask({**request, "name": "seldom"})["error"]
        assert worker.ask({**request, "name": "tuned"})["figures"]["global_stores"] == 1
    finally:
        worker.close()


SIGNATURE = """
import json, subprocess, sys
import torch, triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.tools.tensor_descriptor import TensorDescriptor
from ham.kernels.compile_cases import CompileCase
from ham.kernels.gate.figures import figures_of, tool
from ham.kernels.gate.record import compile_launch, record
from ham.kernels.gate.targets import TARGETS
from toy_cases import outer


@triton.jit(do_not_specialize=["T"])
def kernel(p_a, p_b, p_none, T, one, even, odd, scale, N: tl.constexpr):
    tl.store(p_a + tl.arange(0, N), scale)


@gluon.jit
def gluon_kernel(p_a):
    gl.store(p_a + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0])), 0.0)


@triton.jit
def descriptor_kernel(d, p_a):
    tl.store(p_a + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], d.load([0, 0]))


def others():
    a = torch.zeros(64, 64, dtype=torch.bfloat16)
    gluon_kernel[(1,)](a)
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(a, [64, 64]), a)


def launch():
    a = torch.zeros(65, dtype=torch.bfloat16)
    kernel[(1,)](a[:64], a[1:], None, 64, 1, 32, 33, 0.5, N=64, num_warps=2)


(one,) = record(CompileCase("x", launch), TARGETS["sm_90"])
(spilling,) = record(CompileCase("y", outer), TARGETS["sm_90"])
compiled = compile_launch(spilling)
in_gluon, described = record(CompileCase("z", others), TARGETS["sm_90"])
open(sys.argv[1], "w").write(compiled.asm["ptx"])
command = [tool("ptxas"), "-v", "-lineinfo", "--gpu-name=sm_90a", sys.argv[1], "-o", "/dev/null"]
print(json.dumps({
    "signature": one.source.signature,
    "constants": {str(k): v for k, v in one.source.constants.items()},
    "attributes": sorted(k[0] for k, v in one.source.attrs.items() if v),
    "warps": one.options["num_warps"],
    "gluon": figures_of(compile_launch(in_gluon), TARGETS["sm_90"]),
    "descriptor": described.source.signature["d"],
    "described": figures_of(compile_launch(described), TARGETS["sm_90"]),
    "figures": figures_of(compiled, TARGETS["sm_90"]),
    "ptxas": subprocess.run(command, capture_output=True, text=True, check=True).stderr,
}))
"""


@needs_triton
def test_specialisation_is_tritons_and_spills_are_ptxas_s(
    tmp_path: Path,
) -> None:
    (tmp_path / "toy_cases.py").write_text(TOY.format(product="dot", stages=2, warps=1))
    (tmp_path / "script.py").write_text(SIGNATURE)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "kernel.ptx")]
    environment = clean_environment([tmp_path])
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(output.stdout)
    assert found["signature"] == {
        "p_a": "*bf16",
        "p_b": "*bf16",
        "p_none": "constexpr",
        "T": "i32",
        "one": "constexpr",
        "even": "i32",
        "odd": "i32",
        "scale": "fp32",
        "N": "constexpr",
    }
    assert found["constants"] == {"(2,)": None, "(4,)": 1, "(8,)": 64}
    assert found["attributes"] == [0, 5], "p_a and even are divisible by 16, T is not specialised"
    assert found["warps"] == 2
    assert found["gluon"]["global_stores"] > 0
    assert found["descriptor"] == "tensordesc<bf16[64, 64]>"
    assert found["described"]["tma_loads"] == 1
    figures = found["figures"]
    assert figures["spill_store_bytes"] > 0
    assert f"{figures['spill_store_bytes']} bytes spill stores" in found["ptxas"]
    assert f"Used {figures['registers']} registers" in found["ptxas"]


def test_unknown_target_is_a_user_error() -> None:
    assert [target.name for target in parse_targets("sm_80, sm_90")] == ["sm_80", "sm_90"]
    with pytest.raises(ConfigError, match="unknown target 'sm_75'; known: gfx942, sm_100"):
        parse_targets("sm_75")


def test_without_triton_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["kernels", "gate"]) == 0
    assert "not checked, Triton is not installed" in capsys.readouterr().out


def test_switches_of_triton_do_not_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    environment = clean_environment()
    assert "TRITON_INTERPRET" not in environment
    assert environment["TRITON_CACHE_DIR"] == "/cache"


def test_every_folder_with_compile_cases_is_found() -> None:
    assert "ham.kernels.gated_delta_rule.compile_cases" in case_modules()
    assert not any(name.startswith("ham.kernels.gate.") for name in case_modules())
