"""The static gate's figures: how they are read, compared, limited and stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from ham.kernels.gate.compare import compare
from ham.kernels.gate.figures import count_sass
from ham.kernels.gate.snapshot import Entry, read_snapshot, snapshot_path, write_snapshot
from ham.kernels.gate.targets import TARGETS, over_limits, starved

SASS = """
 Function walk_kernel:
  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;      /* 0x0 */
        /*0020*/             @!UP1 UTMALDG.2D [UR4], [UR6] ;             /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ; /* 0x0 */
        /*0040*/                   STL.128 [R1], R4 ;                    /* 0x0 */
        /*0050*/                   LDL R4, [R1+0x4] ;                    /* 0x0 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;         /* 0x0 */
       /*10070*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR8][R2.64] ; /* 0x0 */
"""


def test_instructions_are_counted() -> None:
    assert count_sass(SASS) == {
        "registers": 168,
        "stack_bytes": 16,
        "spill_store_bytes": 16,
        "spill_load_bytes": 4,
        "global_loads": 1,
        "async_copies": 1,
        "tma_loads": 1,
        "barriers": 1,
        "hgmma": 1,
    }


FIGURES = {
    "registers": 128,
    "warps": 4,
    "shared_bytes": 1000,
    "hgmma": 40,
    "ptx_wgmma": 40,
    "global_loads": 30,
    "async_copies": 20,
    "barriers": 10,
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
}


@pytest.mark.parametrize(
    ("change", "worse", "text"),
    [
        ({"registers": 136}, None, ""),
        ({"registers": 137}, True, "137 registers a thread, 128 before: 3 programs of 4 warps"),
        ({"registers": 100}, False, "5 programs of 4 warps fit a multiprocessor, 4 before"),
        ({"spill_store_bytes": 64}, True, "spills 64 bytes a thread and reads 0 back, 0 and 0"),
        ({"spill_load_bytes": 4}, True, "reads 4 back"),
        ({"shared_bytes": 1001}, True, "takes 1001 bytes of shared memory, 1000 before"),
        ({"shared_bytes": 999}, False, "takes 999 bytes of shared memory, 1000 before"),
        ({"hgmma": 39, "ptx_wgmma": 39}, True, "has 39 HGMMA matrix instructions, 40 before"),
        ({"ptx_wgmma": 39}, True, "has 39 WGMMA matrix instructions"),
        ({"hmma": 4}, True, "has 4 HMMA matrix instructions, 0 before"),
        ({"global_loads": 32}, None, ""),
        ({"global_loads": 33}, True, "has 33 global loads in its code, 30 before"),
        ({"global_loads": 20}, False, "has 20 global loads in its code, 30 before"),
        ({"barriers": 13}, True, "has 13 barriers"),
        ({"async_copies": 0}, True, "fewer loads run ahead of their use"),
        ({"tma_loads": 1}, True, "has 1 loads through the tensor memory accelerator, 0 before"),
    ],
)
def test_changes(change: dict[str, int], worse: bool | None, text: str) -> None:
    changes = list(compare(FIGURES, {**FIGURES, **change}))
    assert [each.worse for each in changes] == ([] if worse is None else [worse])
    assert all(text in each.text for each in changes)


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [(168, 184, None), (168, 185, True), (400, 421, True), (400, 420, None), (168, 150, False)],
)
def test_spills_may_vary_by_a_few_words(before: int, after: int, worse: bool | None) -> None:
    old, new = ({**FIGURES, "spill_store_bytes": each} for each in (before, after))
    assert [each.worse for each in compare(old, new)] == ([] if worse is None else [worse])


def test_limits() -> None:
    figures = {"shared_bytes": 100 * 1024}
    assert over_limits(figures, TARGETS["sm_90"]) == []
    assert "gfx942 has 65536" in over_limits(figures, TARGETS["gfx942"])[0]
    columns = {"shared_bytes": 0, "tensor_memory_columns": 1024}
    assert "tensor memory" in over_limits(columns, TARGETS["sm_100"])[0]


def test_snapshot_is_sorted_and_one_line_per_kernel(tmp_path: Path) -> None:
    snapshot = {
        Entry("b", "case 2", "sm_90", "kernel"): {"registers": 1},
        Entry("b", "case 2", "sm_80", "kernel"): {"registers": 3, "hmma": 2},
        Entry("a", "case 1", "sm_90", "kernel"): {"registers": 2},
    }
    path = snapshot_path("1.2.3", tmp_path)
    write_snapshot(path, "1.2.3", snapshot)
    assert read_snapshot(path) == snapshot
    lines = [line.strip() for line in path.read_text().splitlines() if "kernel" in line]
    assert lines == [
        '"kernel": {"registers": 2}',
        '"kernel": {"hmma": 2, "registers": 3}',
        '"kernel": {"registers": 1}',
    ]


def test_starved_kernels_spill_though_registers_are_free() -> None:
    assert starved({"registers": 32, "spill_store_bytes": 6220})
    assert not starved({"registers": 255, "spill_store_bytes": 6220})
    assert not starved({"registers": 32, "spill_store_bytes": 64})
    assert not starved({"shared_bytes": 0})
