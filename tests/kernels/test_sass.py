"""What is read from machine code, on code written by hand."""

from collections import Counter

from moe.kernels import sass

# As nvdisasm prints it. A loop over tiles (.L_x_0) around one over steps (.L_x_1); the end of a tile, with spills of
# its own, lies within the inner loop as well: the way past it is the main loop.
CODE = """
	.section	.text.product,"ax",@progbits
.text.product:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0020*/               @P1 EXIT ;
.L_x_0:
        /*0030*/                   STL [R1], R4 ;
        /*0040*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   BSSY B0, `(.L_x_3) ;
.L_x_1:
        /*0070*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R6.64], P2 ;
        /*0080*/              @!P3 LDGSTS.E.BYPASS.LTC128B.128 [R5+0x80], desc[UR4][R6.64+0x80] ;
        /*0090*/                   LDGSTS.E.LTC128B [R5+0x90], desc[UR4][R6.64+0x90] ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*00c0*/              @!P0 BRA `(.L_x_2) ;
        /*00d0*/                   STL.64 [R1+0x8], R4 ;
        /*00e0*/                   LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;
        /*00f0*/                   LDL R4, [R1] ;
.L_x_2:
        /*0100*/                   LDL.LU R4, [R1] ;
        /*0110*/                   BRA.U UP0, `(.L_x_1) ;
        /*0120*/                   BSYNC B0 ;
.L_x_3:
        /*0130*/               @P4 BRA `(.L_x_0) ;
        /*0140*/                   EXIT ;
.L_x_4:
        /*0150*/                   BRA `(.L_x_4) ;
"""


def test_the_main_loop_is_the_shortest_way_round_through_the_products() -> None:
    loop = sass.main_loop(CODE)
    assert loop == sass.Loop(instructions=8, products=2, spills=1, loads=Counter({16: 2, 4: 1}))


def test_without_tensor_cores_the_main_loop_multiplies_and_adds() -> None:
    loop = sass.main_loop(CODE.replace("HGMMA.64x128x16.F32.BF16", "FFMA"))
    assert (loop.products, loop.spills) == (2, 1)
    assert sass.main_loop(CODE.replace("HGMMA.64x128x16.F32.BF16", "FADD")) == sass.Loop()


def test_widths_of_loads() -> None:
    names = {
        "LDG.E.U8": 1,
        "LDG.E.S16.CONSTANT": 2,
        "LDG.E": 4,
        "LDGSTS.E.LTC128B": 4,
        "LDG.E.64": 8,
        "LDG.E.EF.128.CONSTANT": 16,
        "LDGSTS.E.BYPASS.LTC128B.128": 16,
        "LDS.128": 0,
        "STG.E.128": 0,
    }
    assert {name: sass.load_width(name) for name in names} == names
