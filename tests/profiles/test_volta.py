"""The counter of sm_70 code, on code written by hand."""

from __future__ import annotations

import pytest

from evit_fast.profiles.volta import Machine, Tensor

X = Tensor(1 << 36, 1 << 20)


def machine(*lines: str, words=(X, 5), threads: int = 64, shared_bytes: int = 4096) -> Machine:
    """Lines ending in a colon are labels."""
    text, at = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{at:04x}*/                   {line} ;")
            at += 16
    return Machine("\n".join(text), {}, list(words), threads, shared_bytes)


def test_a_loop_runs_as_often_as_its_argument_says():
    block = machine(
        "IMAD.MOV.U32 R0, RZ, RZ, RZ",
        ".L_x_0:",
        "FFMA R2, R3, R4, R5",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.LT.AND P0, PT, R0, c[0x0][0x168], PT",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    ).run(0)
    assert block.executed["FFMA"] == 5 * 2
    assert (block.issued, block.longest) == (2 * (1 + 5 * 4 + 1), 22)


def test_a_branch_counts_once_for_each_warp_that_takes_it():
    block = machine(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x20, PT",
        "@P0 BRA `(.L_x_0)",
        "FADD R1, R2, R3",
        ".L_x_0:",
        "FMUL R1, R2, R3",
        "EXIT",
    ).run(0)
    assert (block.executed["FADD"], block.executed["FMUL"]) == (1, 2)


def test_both_sides_of_a_branch_meet_again():
    """The lower half loops twice; what comes after is issued once for the warp."""
    block = machine(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x10, PT",
        "IMAD.MOV.U32 R1, RZ, RZ, RZ",
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:",
        "FADD R2, R2, R3",
        "IADD3 R1, R1, 0x1, RZ",
        "ISETP.LT.AND P1, PT, R1, 0x2, PT",
        "@P1 BRA `(.L_x_0)",
        ".L_x_1:",
        "FMUL R2, R2, R3",
        "EXIT",
        threads=32,
    ).run(0)
    assert (block.executed["FADD"], block.executed["FMUL"]) == (2, 1)
    assert block.issued == 4 + 2 * 4 + 2


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("SHF.L.U32 R1, R0, 0x4, RZ", 0xFFFFFF60),
        ("SHF.R.U32.HI R1, RZ, 0x4, R0", 0x0FFFFFFF),
        ("SHF.R.S32.HI R1, RZ, 0x4, R0", 0xFFFFFFFF),
        ("LEA.HI R1, R0, R2, RZ, 0x1", 8),  # + the sign bit
        ("LEA.HI.SX32 R1, R0, R2, 0x1e", 4),  # + -10 >> 2
        ("LOP3.LUT R1, R0, 0xf, RZ, 0xc0, !PT", 6),
        ("LOP3.LUT R1, R0, R2, RZ, 0x3c, !PT", 0xFFFFFFF1),
        ("IADD3 R1, R2, -R0, 0x1", 18),
        ("IMAD R1, R0, R2, 0x3", 2**32 - 67),
        ("SEL R1, R0, R2, !PT", 7),
        ("PRMT R1, R0, 0x5410, R2", 0x0007FFF6),
        ("IMAD.WIDE R4, R0, R2, RZ", None),
    ],
)
def test_integers(line, value):
    """R0 is -10, R2 is 7."""
    m = machine("MOV R0, 0xfffffff6", "MOV R2, 0x7", line, "EXIT", threads=32)
    m.run(0)
    if value is None:
        assert (m.registers[5, 0], m.registers[4, 0]) == (0xFFFFFFFF, 2**32 - 70)
    else:
        assert m.registers[1, 0] == value


def test_comparison_of_two_words():
    """(1, 5) >= (1, 6)? The low words decide where the high ones are equal."""
    m = machine(
        "MOV R0, 0x5", "MOV R1, 0x6", "MOV R2, 0x1",
        "ISETP.GE.U32.AND P0, PT, R0, R1, PT", "ISETP.GE.AND.EX P1, PT, R2, R2, PT, P0",
        "ISETP.GE.U32.AND P0, PT, R1, R0, PT", "ISETP.GE.AND.EX P2, PT, R2, R2, PT, P0", "EXIT",
    )  # fmt: skip
    m.run(0)
    assert (m.predicates[1, 0], m.predicates[2, 0]) == (False, True)


@pytest.mark.parametrize(("stride", "waves"), [(4, 1), (8, 2), (128, 32), (132, 1)])
def test_bank_conflicts(stride, waves):
    block = machine(
        "S2R R0, SR_TID.X", f"IMAD R0, R0, {stride:#x}, RZ", "LDS.U R1, [R0]", "EXIT",
        threads=32, shared_bytes=8192,
    ).run(0)  # fmt: skip
    assert (block.shared_waves, block.least_waves) == (waves, 1)


def test_sectors_and_lines():
    load = (
        "S2R R0, SR_TID.X", "IMAD.SHL.U32 R0, R0, 0x10, RZ", "IADD3 R2, P0, R0, c[0x0][0x160], RZ",
        "IMAD.X R3, RZ, RZ, c[0x0][0x164], P0", "LDG.E.128.SYS R4, [R2]",
        "LDG.E.128.SYS R4, [R2]", "STG.E.128.SYS [R2], R4", "EXIT",
    )  # fmt: skip
    block = machine(*load).run(0)
    assert (block.sectors, block.distinct, block.stored) == (64, 32, 32)
    assert block.lines == 3 * 8


def test_lanes_that_are_off_touch_nothing():
    block = machine(
        "S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x4, PT", "IMAD.SHL.U32 R0, R0, 0x80, RZ",
        "@P0 LDS.U R1, [R0]", "EXIT",
        threads=32, shared_bytes=512,
    ).run(0)  # fmt: skip
    assert block.shared_waves == 4


def test_shared_memory_keeps_addresses():
    block = machine(
        "S2R R0, SR_TID.X", "IMAD.SHL.U32 R1, R0, 0x4, RZ", "STS [R1], R1", "BAR.SYNC 0x0",
        "LDS.U R2, [R1]", "LDS.U R3, [R2+0x10]", "EXIT",
    ).run(0)  # fmt: skip
    assert block.executed["LDS.U"] == 4


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("LDS.U R2, [R1]", "shared memory"),  # R1 was never written
        ("LDG.E.SYS R2, [R4]", "no tensor's"),
        ("POPC R1, R2", "POPC is not known"),
    ],
)
def test_what_cannot_be_right_is_an_error(line, text):
    with pytest.raises(RuntimeError, match=text):
        machine(line, "EXIT").run(0)


def test_division_by_a_number_of_the_launch():
    """As NVRTC writes 100 / 7: a float's reciprocal, corrected."""
    block = machine(
        "I2F.U32.RP R0, c[0x0][0x170]",
        "MUFU.RCP R0, R0",
        "IADD3 R0, R0, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R0",
        "IMAD.MOV.U32 R2, RZ, RZ, RZ",
        "IMAD.MOV R1, RZ, RZ, -R3",
        "IMAD R1, R1, c[0x0][0x170], RZ",
        "IMAD.WIDE.U32 R2, R3, R1, R2",
        "IMAD.WIDE.U32 R2, R3, c[0x0][0x168], RZ",
        "IMAD.MOV R2, RZ, RZ, -R3",
        "IMAD R1, R2, c[0x0][0x170], c[0x0][0x168]",
        "ISETP.GE.U32.AND P0, PT, R1, c[0x0][0x170], PT",
        "@P0 IADD3 R3, R3, 0x1, RZ",
        "ISETP.NE.AND P1, PT, R3, 0xe, PT",
        "@P1 FADD R1, R2, R3",
        "EXIT",
        words=(X, 100, 7),
    ).run(0)
    assert block.executed["FADD"] == 0
