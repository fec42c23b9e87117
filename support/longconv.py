"""The long convolution of diffussm.py: fast, and with little memory. To understand the paper you need not read it.

    Y = convolve(U, K)                      U (b, L, 2D), K (2D, L) -> Y (b, L, 2D)

It gives the same numbers as `diffussm.convolve_ref`, which says in nine lines what is computed. It is faster because

- it works in tiles, whose spectra fit a CPU's cache (a GPU gets one tile per direction);
- its backward pass is written by hand. PyTorch's own does a complex FFT for each real one, which is twice the work,
  and it stores spectra. This one stores U and K;
- it is an operator of its own. torch.compile takes it as one step and asks only for its shapes. (Inductor has no code
  for complex numbers.)

Forward-mode AD, second derivatives and the transforms of torch.func take `plain`, which is convolve_ref again.
"""
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from diffusion import UserError

TILE = {"cpu": 2**18}                   # how many numbers of U a tile may have; other devices have no limit


def convolve(U, K):
    """U (b, L, 2D), K (2D, L), both float32 or both float64 -> Y (b, L, 2D). The first D channels are read from the
    left, the others from the right:

        from the left     Y_l = sum_{i <= l} K_i U_{l-i}
        from the right    Y_l = sum_{i < L-l} K_i U_{l+i}

    Raises UserError if the shapes do not fit.
    """
    if K.shape != (U.shape[2], U.shape[1]) or len(K) % 2:
        raise UserError(f"U {tuple(U.shape)} and K {tuple(K.shape)} do not fit: make them (b, L, 2D) and (2D, L)")
    return plain(U, K) if transformed() else convolution(U, K)


def transformed():
    """As in scan.py."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def plain(U, K):
    """`convolve_ref` of diffussm.py, which PyTorch can differentiate in all its ways."""
    from_left, from_right = rfft(K).chunk(2)                                           # 2 x (D, L+1)
    return irfft(rfft(U.mT) * torch.cat([from_left, from_right.conj()])).mT            # (b, L, 2D)


@torch.library.custom_op("longconv::convolution", mutates_args=())
def convolution(U: Tensor, K: Tensor) -> Tensor:
    """`convolve` in tiles."""
    Y = torch.empty_like(U)
    for channels, right, batches in tiles(U):
        K_hat = spectrum(K[channels], mirrored=right)                                  # (channels, L+1)
        for images in batches:
            Y[images, :, channels] = irfft(rfft(U[images, :, channels].mT).mul_(K_hat)).mT
    return Y


@torch.library.custom_op("longconv::convolve_backward", mutates_args=())
def convolve_backward(dY: Tensor, U: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Y, and what `convolution` was given -> the gradients of U and K. They are convolutions and
    correlations, so spectra (_hat) are multiplied. In a correlation one of the two is conjugated:

        from the left     dU_l = sum_i K_i dY_{l+i}    conj(K_hat) dY_hat
                          dK_i = sum_l U_l dY_{l+i}    conj(U_hat) dY_hat
        from the right    dU_l = sum_i K_i dY_{l-i}    K_hat dY_hat
                          dK_i = sum_l dY_l U_{l+i}    conj(dY_hat) U_hat, the conjugate of dK_hat from the left
    """
    dU, dK = torch.empty_like(U), torch.empty_like(K)
    for channels, right, batches in tiles(U):
        K_hat = spectrum(K[channels], mirrored=not right)                              # (channels, L+1)
        dK_hat = torch.zeros_like(K_hat)
        for images in batches:
            dY_hat = rfft(dY[images, :, channels].mT)                                  # (images, channels, L+1)
            dK_hat += rfft(U[images, :, channels].mT).conj_physical_().mul_(dY_hat).sum(0)
            dU[images, :, channels] = irfft(dY_hat.mul_(K_hat)).mT                     # (images, L, channels)
        dK[channels] = irfft(dK_hat.conj() if right else dK_hat)                       # (channels, L)
    return dU, dK


def differentiate(ctx, dY):
    if torch.is_grad_enabled() or transformed():            # create_graph=True: this, too, will be differentiated
        return torch.func.vjp(plain, *ctx.saved_tensors)[1](dY)
    return convolve_backward(dY, *ctx.saved_tensors)


convolution.register_fake(lambda U, K: torch.empty_like(U))
convolve_backward.register_fake(lambda dY, U, K: (torch.empty_like(U), torch.empty_like(K)))
convolution.register_autograd(
    differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@register_flop_formula(torch.ops.longconv.convolution)
def operations(U_shape, K_shape, **_):
    """For PyTorch's FLOP counter: FLOPs, twice the multiply-adds. For each image and channel: two real FFTs of n = 2L
    numbers, at 2.5 n log2 n each, and L + 1 complex products, at 6 each. The FFT of K is left out: all images share it.
    """
    images, L, channels = U_shape
    n = 2 * L
    return round(images * channels * (2 * 2.5 * n * math.log2(n) + 6 * (L + 1)))


def tiles(U):
    """The pieces to work on -> a list of (channels, are they read from the right?, [images, ...]). `channels` and
    `images` are slices. Both directions take equal parts."""
    b, L, channels = U.shape
    half = channels // 2                                                # channels of one direction
    most = TILE.get(U.device.type, U.numel())
    width = min(half, max(1, most // L))                                # channels of a tile
    height = max(1, most // (L * width))                                # images of a tile
    return [(slice(i, min(i + width, end)), end == channels, [slice(j, j + height) for j in range(0, b, height)])
            for end in (half, channels) for i in range(end - half, end, width)]


def spectrum(K, mirrored):
    """The spectrum of K, or of its mirror image in time. Reading from the right, Y_l = sum_i K_i U_{l+i}, means
    convolving with the mirror image. Its spectrum is the conjugate of K's, so nothing needs to be flipped."""
    return rfft(K).conj_physical_() if mirrored else rfft(K)


def rfft(x):
    # Padded to 2L. A product of spectra is a circular convolution: without zeros its end would wrap to the start.
    return torch.fft.rfft(x.contiguous(), n=2 * x.shape[-1])                           # (.., L+1)


def irfft(x_hat):
    L = x_hat.shape[-1] - 1
    return torch.fft.irfft(x_hat, n=2 * L)[..., :L]                                    # (.., L)
