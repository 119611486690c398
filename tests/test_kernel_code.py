"""What is read off a kernel's machine code: bytes in flight, sectors, resident programs."""

from types import SimpleNamespace

import pytest
import torch

from predict.in_flight import (
    BANDWIDTHS,
    FIRST_PARAMETER,
    in_flight,
    large_tensors,
    loads_of,
    num_loops,
    resident_programs,
    sectors,
)
from predict.kernel_code import Compiled

X, MEAN = 0x0, 0x8  # offsets of the parameters


def sass(*lines: str) -> str:
    """As nvdisasm prints it; {x} and {mean} are the parameters' places."""
    text = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;"
                     for i, line in enumerate(lines))  # fmt: skip
    x, mean = (f"c[0x0][{FIRST_PARAMETER + at:#x}]" for at in (X, MEAN))
    return text.replace("{x}", x).replace("{mean}", mean)


ADDRESSES = (
    "LDC.64 R2, {x}",
    "ULDC.64 UR8, {mean}",
    "IMAD.WIDE R4, R9, 0x2, R2",
    "IADD3 R6, P0, R9, UR8, RZ",
)
LOAD_X, LOAD_X2 = "@P1 LDG.E.128 R12, desc[UR4][R4.64]", "LDG.E.128 R16, desc[UR4][R4.64+0x10]"
LOAD_MEAN = "@!P0 LDG.E.128 R20, desc[UR4][R6.64]"


def test_loads_before_the_first_use_are_in_flight_and_vectors_of_channels_do_not_count():
    both = loads_of(sass(*ADDRESSES, LOAD_X, LOAD_X2, LOAD_MEAN, "FADD R0, R13, R20"), {X: "x"})
    assert (both.in_flight, both.copies_ahead, both.widths) == (32, False, {16: 2})
    # the second load is behind the first one's use: never both
    apart = loads_of(sass(*ADDRESSES, LOAD_X, "FADD R0, R13, R1", LOAD_X2, "FADD R0, R16, R1"),
                     {X: "x"})  # fmt: skip
    assert (apart.in_flight, apart.widths) == (16, {16: 2})
    # a register that was an address and is another value now
    reused = loads_of(sass(*ADDRESSES, "MOV R4, R1", LOAD_X, "FADD R0, R13, R1"), {X: "x"})
    assert reused.widths == {}


def test_groups_that_a_pipelined_loop_does_not_wait_for_are_in_flight():
    copy = "LDGSTS.E.BYPASS.128 [R19], desc[UR4][R4.64], P4"
    code = [*ADDRESSES, *(copy, copy, "LDGDEPBAR") * 3, "DEPBAR.LE SB0, 0x2", copy, "LDGDEPBAR"]
    found = loads_of(sass(*code, "DEPBAR.LE SB0, 0x0"), {X: "x"})
    assert (found.in_flight, found.copies_ahead, found.widths) == (64, True, {16: 7})


def test_loops_are_conditional_branches_back():
    code = "@!P0 BRA `(.L_x_1) ;\n.L_x_0:\n @P1 BRA `(.L_x_0) ;\n.L_x_1:\n.L_x_2:\n BRA `(.L_x_2);"
    assert num_loops(code) == 1
    assert num_loops(code.replace("@P1 BRA `(.L_x_0)", "@P1 BRA `(.L_x_1)")) == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (64, 0, 8, 4),
        (65, 0, 8, 3),  # 72 in hardware: 7 warps a scheduler, 28 in all
        (100, 49152, 8, 2),
        (32, 50000, 8, 4),  # 228 KiB of shared memory
        (16, 0, 8, 8),  # 64 warps
    ],
)
def test_resident_programs_are_limited_by_registers_shared_memory_and_warps(
    registers, shared, warps, programs
):
    assert resident_programs({"registers": registers, "shared": shared}, warps) == programs


def layout(columns: int, per_lane: int, lanes: int, kind: str) -> str:
    return (
        f"#blocked1 = #ttg.blocked<{{sizePerThread = [1, {per_lane}], "
        f"threadsPerWarp = [{32 // lanes}, {lanes}], warpsPerCTA = [8, 1], order = [1, 0]}}>\n"
        f"%x = tt.load %p, %m, %c : tensor<64x{columns}x!tt.ptr<{kind}>, #blocked1> loc(#loc)"
    )


def test_sectors_of_a_request_are_those_that_its_lanes_touch():
    assert sectors(layout(64, 8, 8, "bf16")) == (16, 16)
    assert sectors(layout(64, 1, 32, "bf16")) == (2, 2)
    assert sectors(layout(64, 8, 8, "f32")) == (32, 16)  # every second half of a sector
    assert sectors(layout(8, 8, 1, "bf16")) == (32, 16)  # 8 channels: 16 bytes a row
    assert sectors("") == (0, 0)


def test_bytes_of_a_multiprocessor_are_those_of_its_resident_programs_beside_littles_law():
    x, mean = torch.empty(1 << 16, 64, dtype=torch.bfloat16), torch.empty(2, 64)
    launch = SimpleNamespace(
        label="k", shape=x.shape, count=1, grid=(132, 3), options={"num_warps": 8},
        tensors=[x, mean],
        arguments={"x_ptr": x, "n": 64, "mean_ptr": mean},
        signature={"BLOCK": "constexpr", "n": "i32", "x_ptr": "*bf16", "mean_ptr": "*fp32"},
    )  # fmt: skip
    assert large_tensors(launch) == {8: "x_ptr"}  # after an int, aligned
    code = sass(*ADDRESSES, LOAD_X, "FADD R0, R13, R1").replace("0x210", "0x218")
    compiled = Compiled({"registers": 64, "shared": 0, "spills": 0}, code, layout(64, 8, 8, "bf16"))
    found = in_flight(launch, compiled)
    assert found["resident_programs"] == 3  # of the grid; 4 would fit
    assert found["in_flight_kib"] == 3 * 256 * 16 / 1024
    little = BANDWIDTHS["h200"] * 700e-9 / 132
    assert found["of_little_h200"] == round(3 * 256 * 16 / little, 2)
