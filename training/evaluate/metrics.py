"""Image metrics with one value per image: PSNR, SSIM, MSE and LPIPS between reconstructions and originals.

Images are in [-1, 1] (reconstructions are clamped to it first, as for display), so an MSE of 0.01 is a PSNR of 26 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from training.losses.perceptual import PerceptualTrunk

_RANGE = 2.0  # of images in [-1, 1]
_SSIM_BORDER = 5  # half of SSIM's window of 11 pixels


@torch.no_grad()
def image_metrics(reconstruction: Tensor, pixels: Tensor, trunk: PerceptualTrunk | None) -> dict[str, Tensor]:
    """Metrics of each image; reports give their mean over images.

    Args:
        reconstruction: (N, 3, H, W); clamped to [-1, 1].
        pixels: The originals, same shape, in [-1, 1].
        trunk: Feature network of LPIPS; None leaves LPIPS out.

    Returns:
        (N,) float32 each: `mse` on [-1, 1]; `psnr` in dB, 10 log10(2^2 / mse); `ssim` (Wang et al. 2004: Gaussian
        window of 11 pixels, sigma 1.5, on [0, 1], the window inside the image, mean over channels; scikit-image's
        value with those settings); `lpips_<trunk>` (Zhang et al. 2018).
    """
    reconstruction = reconstruction.float().clamp(-1, 1)
    pixels = pixels.float()
    mse = (reconstruction - pixels).square().mean(dim=(1, 2, 3))
    # On [0, 1], because the luminance term compares means, so its value depends on the origin. Without the border, where
    # the window would leave the image.
    _, ssim_map = structural_similarity_index_measure(
        (reconstruction + 1) / 2, (pixels + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    values = {
        "mse": mse,
        # 100 dB for equal images: infinity would make every mean infinite.
        "psnr": 10 * torch.log10(_RANGE**2 / mse.clamp_min(_RANGE**2 * 1e-10)),
        "ssim": ssim_map[..., _SSIM_BORDER:-_SSIM_BORDER, _SSIM_BORDER:-_SSIM_BORDER].mean(dim=(1, 2, 3)),
    }
    if trunk is not None:
        values[f"lpips_{trunk.name}"] = trunk.lpips(trunk.features(reconstruction), trunk.features(pixels))
    return values
