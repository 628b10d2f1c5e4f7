"""The interpreter of PTX, on a program written by hand."""

import numpy as np
import ptx
import pytest

# Thread i adds the numbers of threads i and i ^ 16, of 32; the first 16 write three times that, plus one.
TEXT = """
.visible .entry pairs(
	.param .u64 .ptr .align 16 pairs_param_0,
	.param .u64 .ptr .align 16 pairs_param_1
)
.reqntid 32, 1, 1
{
	.reg .pred %p<2>;
	ld.param.b64 	%rd1, [pairs_param_0];
	ld.param.b64 	%rd2, [pairs_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.s32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.b32 	%r2, [%rd4+0];
	// begin inline asm
	shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
	// end inline asm
	add.rn.f32 	%r4, %r2, %r3;
	fma.rn.f32 	%r6, %r4, 0f40400000, 0f3F800000;
	setp.lt.s32 	%p1, %r1, 16;
	@%p1 st.global.b32 	[%rd5], %r6;
$L__BB0_2:
	ret;

}
"""
X = np.random.default_rng(0).normal(size=32).astype(np.float32)


def run(text):
    return ptx.Program(text).run([X], [((32,), np.float32)], {}, programs=1)


def test_threads_trade_and_some_write():
    [y] = run(TEXT)
    np.testing.assert_allclose(y[:16], 3 * (X[:16] + X[16:]) + 1, rtol=1e-5)
    assert np.isnan(y[16:]).all()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("[%rd4+0]", "[%rd4+4]", r"pairs, program 0: ld.global.b32"),  # the last thread reads behind the array
        ("@%p1 st.global", "@%p1 bra $L__BB0_2;\n\tst.global", r"@%p1 bra"),  # some go, some stay
        ("mov.u32 \t%r1", "popc.b32 \t%r1", r"popc.b32"),
        ("shfl.sync.bfly", "shfl.sync.down", r"shfl.sync.down"),
        ("reqntid 32", "reqntid 64", "not of one warp"),
    ],
)
def test_errors(old, new, error):
    assert old in TEXT
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        run(TEXT.replace(old, new))
