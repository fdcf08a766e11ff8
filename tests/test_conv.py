"""The 3x3 convolution of the segmentation head: the gradient summed over blocks of rows is that of the plain form."""

import jax
import numpy as np
import pytest

from phpjax.tasks import conv


def draw(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(function, x, kernel, weight):
  return jax.jit(jax.grad(lambda x, kernel: (function(x, kernel) * weight).sum(), argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize(("n", "height", "width"), [(1, 8, 8), (3, conv.LEAST_SIDE, 20), (2, conv.LEAST_SIDE + 6, 7)])
def test_gradients_are_those_of_the_plain_form(n, height, width):
  x, kernel, weight = draw(n, height, width, 5), draw(3, 3, 5, 4, seed=1), draw(n, height, width, 4, seed=2)
  np.testing.assert_array_equal(conv.conv3x3(x, kernel), conv.plain(x, kernel))
  expected = gradients(conv.plain, x, kernel, weight)
  for ours, theirs in zip(gradients(conv.conv3x3, x, kernel, weight), expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  blocks = jax.jit(conv.kernel_gradient)(x, weight)
  np.testing.assert_allclose(blocks, expected[1], rtol=0, atol=1e-5 * np.abs(expected[1]).max())


def test_blocks_divide_the_image_and_stay_small():
  for n, height in ((1, 224), (5, 224), (32, 224), (2, 97), (7, 96)):
    rows = conv.rows_of_block(n, height)
    assert height % rows == 0 and (rows == 1 or n * rows <= conv.PIXEL_ROWS)
  assert conv.rows_of_block(1, 224) == 16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="blocks are for CPU")
def test_large_images_take_a_loop_and_its_rounds_are_counted():
  x, kernel, weight = draw(2, 112, 112, 16), draw(3, 3, 16, 8), draw(2, 112, 112, 8)
  count = lambda f: jax.jit(f).lower(x, weight).compile().cost_analysis()["flops"]
  left_out = conv.uncounted_flops(2, 112, 16, 8)
  of_kernel = lambda x, weight: jax.vjp(lambda k: conv.conv3x3(x, k), kernel)[1](weight)[0]
  assert count(of_kernel) + left_out == pytest.approx(2.0 * 2 * 112 * 112 * 9 * 16 * 8, rel=0.05)
  assert left_out > 0.8 * 2 * 2 * 112 * 112 * 9 * 16 * 8
  assert conv.uncounted_flops(2, conv.LEAST_SIDE - 1, 16, 8) == 0
