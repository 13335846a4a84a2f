"""What the count of a loop's instructions makes of a listing."""

from kernels.cuda.hot_loops import Count, count_tile, functions

# A loop of 16 products in one of 18 instructions more, 3 of which a branch skips; another branch skips a load.
INNER = [
    "@!P0 BRA 0x0c0",
    "FMUL R1, R1, R2",
    "@P3 FSEL R1, R1, -INF, !P4",
    "FMUL R3, R3, R2",
    "@!P1 BRA 0x0e0",
    "LDGSTS.E.BYPASS.LTC128B.128 [R27], desc[UR6][R8.64], P1",
    "LDSM.16.M88.4 R8, [R10+0x80]",
    "LDSM.16.MT88.4 R8, [R10]",
]
CODE = ["MOV R1, R2", "MOV R2, R3", "MOV R3, R4", "MOV R4, R5", "MOV R5, R6", "MOV R6, R7", "MOV R7, R8", "MOV R8, R9"]
CODE += [*INNER, *["HMMA.16816.F32.BF16 R140, R36.reuse, R138, RZ"] * 16, "@!P0 BRA 0x080", "@P1 BRA 0x000", "EXIT"]


def listing(name: str, code: list[str]) -> str:
    lines = [f"        /*{16 * i:04x}*/    {text} ;    /* 0x0000000000007945 */" for i, text in enumerate(code)]
    return "\n".join([f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"', *lines])


def test_the_smallest_loop_with_products_is_counted_without_what_it_skips() -> None:
    text = listing("_Z13decode_kernel13AttentionArgs", CODE) + "\n" + listing("other", ["EXIT"])
    found = dict(functions(text))
    assert list(found) == ["_Z13decode_kernel13AttentionArgs", "other"]
    assert len(found["_Z13decode_kernel13AttentionArgs"]) == len(CODE)
    # The loop is INNER, the products and the branch back.
    assert count_tile(found["_Z13decode_kernel13AttentionArgs"]) == Count(8 + 16 + 1 - 3, 16, 2, 3)


def test_a_function_without_products_has_no_such_loop() -> None:
    (_, code), *_ = functions(listing("copy", ["MOV R1, R2", "@P0 BRA 0x000", "EXIT"]))
    assert count_tile(code) is None
