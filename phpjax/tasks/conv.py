"""A 3x3 convolution whose kernel's gradient is fast on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

LEAST_SIDE = 96  # pixels; below, XLA's own gradient is as fast
PIXEL_ROWS = 16  # of all images together in one product: they fit into a core's cache


class Conv3x3(nn.Module):
  """Weights of `conv3x3` with F features, as nn.Conv(F, (3, 3), use_bias=False) names and draws them."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, H, W, F]."""
    return conv3x3(x, self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features)))


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """What `conv3x3` computes, with the gradient that JAX gives it."""
  return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [N, H, W, C], kernel [3, 3, C, F] -> [N, H, W, F]; zeros lie around the image.

  On CPU, XLA differentiates the kernel of a large image by a convolution with a window of the image's size, several times
  slower than a matrix product. Here that gradient is a sum of such products over blocks of rows (`kernel_gradient`).
  """
  return plain(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return plain(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = kept
  (of_image,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(gradient)
  own = lambda x, gradient: jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(gradient)[0]
  if x.shape[1] < LEAST_SIDE:
    return of_image, own(x, gradient)
  return of_image, lax.platform_dependent(x, gradient, cpu=kernel_gradient, default=own)


conv3x3.defvjp(_forward, _backward)


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """x [N, H, W, C], gradient [N, H, W, F] -> that of the kernel [3, 3, C, F]."""
  (n, height, width, channels), features, rows = x.shape, gradient.shape[-1], rows_of_block(*x.shape[:2])
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).transpose(3, 0, 1, 2)

  def add(total: jax.Array, top: jax.Array) -> tuple[jax.Array, None]:
    block = lax.dynamic_slice_in_dim(padded, top, rows + 2, axis=2)
    shifted = [block[:, :, i : i + rows, j : j + width] for i in range(3) for j in range(3)]
    columns = jnp.stack(shifted).reshape(9 * channels, n * rows * width)
    return total + columns @ lax.dynamic_slice_in_dim(gradient, top, rows, axis=1).reshape(-1, features), None

  total, _ = lax.scan(add, jnp.zeros((9 * channels, features), gradient.dtype), jnp.arange(0, height, rows))
  return total.reshape(3, 3, channels, features)


def rows_of_block(n: int, height: int) -> int:
  """Rows of each of n images in one product: a divisor of the height, about PIXEL_ROWS in all."""
  return max(rows for rows in range(1, height + 1) if height % rows == 0 and rows <= max(PIXEL_ROWS // n, 1))


def uncounted_flops(n: int, side: int, channels: int, features: int) -> float:
  """Operations of `kernel_gradient` on square images that a compiler leaves out of its count: all rounds but the first."""
  if side < LEAST_SIDE or jax.default_backend() != "cpu":
    return 0.0
  return (1 - rows_of_block(n, side) / side) * 2.0 * n * side * side * 9 * channels * features
