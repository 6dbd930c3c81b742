"""The training loss: named, weighted terms that compare a reconstruction with its target, and KL.

By default 0.4 MSE + 0.2 L1 + 0.2 perceptual + 0.2 LPIPS + beta KL. `ReconstructionLoss` owns the feature networks
(trunks), the sizes of their random crops and the weights; `vae_loss` adds KL and takes the mean over the images.

Images are in [-1, 1], so an MSE of 0.01 is a PSNR of 26 dB. All terms are float32 outside autocast; only the
convolutions of the feature networks follow it. Each term has one value per image, averaged over the images: the mean over
equally large ranks is the value of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from training.config import LossConfig
from training.losses.adversarial import AdversarialLoss
from training.losses.perceptual import PerceptualTrunk, full_precision

_RESERVED = ("kl", "reconstruction", "total", "adversarial", "discriminator")  # other parts of `vae_loss`


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) of each latent dimension.

    The closed form of Kingma and Welling 2014 (app. B): (mean^2 + exp logvar - 1 - logvar) / 2.

    The loss takes the mean over dimensions, whose scale does not depend on the size of the latent. The bound on the
    likelihood of an image (ELBO, nats per image) has the sum, which is the mean times the number of latent dimensions.

    Args:
        mean: Posterior mean, any shape.
        logvar: The same shape, natural logarithm of the posterior variance.

    Returns:
        The same shape, float32 outside autocast, nats per dimension, at least 0.

    Raises:
        ValueError: The shapes differ.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"the posterior mean is {tuple(mean.shape)} and its logvar {tuple(logvar.shape)}: give equal shapes."
        )
    with full_precision(mean.device):
        mean, logvar = mean.float(), logvar.float()
        # expm1 keeps the digits that exp(logvar) - 1 loses near the prior.
        return 0.5 * (mean.square() + torch.expm1(logvar) - logvar)


def random_crops(batches: Sequence[Tensor], positions: Tensor, size: int) -> list[Tensor]:
    """Crop each image at a position of its own, in one gather for each batch.

    Args:
        batches: (N, C, H, W) each, all of the same shape; image i of every batch is cropped at the same position.
        positions: Top and left in pixels, (N, 2), int64, on the device of the images, inside them.
        size: Height and width of the crops in pixels.

    Returns:
        For each batch (N, C, size, size), channels_last, with gradient.
    """
    _, channels, _, width = batches[0].shape
    rows, columns = (positions[:, :, None] + torch.arange(size, device=positions.device)).unbind(dim=1)  # (N, size)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, :, None].expand(-1, -1, channels)
    # (N, H * W, C) are views where the images are channels_last.
    pixels = (images.permute(0, 2, 3, 1).flatten(1, 2) for images in batches)
    return [torch.gather(each, 1, index).unflatten(1, (size, size)).permute(0, 3, 1, 2) for each in pixels]


class ReconstructionLoss:
    """Weighted reconstruction terms, with everything that they read.

    Args:
        networks: Frozen feature networks (trunks) on the device. The perceptual term reads the first one; LPIPS is the
            mean over all of them. Empty if both terms have weight 0.
        crop_sizes: For each network the height and width of the random crops that it reads, in pixels; None for full
            images. Omitted, all networks read full images.
        adversarial: Adds the raw term `adversarial`, for reconstructions with gradient only; needs a network.
        mse, l1, perceptual, lpips: Weights of the terms. MSE and L1 read full images.

    Attributes:
        networks, crop_sizes, adversarial: As given.
        weights: Weight of each term by name.

    Raises:
        ValueError: A weight that is negative or not finite, or a perceptual term with weight and no network.
    """

    def __init__(
        self,
        networks: Sequence[PerceptualTrunk] = (),
        crop_sizes: Sequence[int | None] | None = None,
        *,
        adversarial: AdversarialLoss | None = None,
        mse: float = 0.4,
        l1: float = 0.2,
        perceptual: float = 0.2,
        lpips: float = 0.2,
    ) -> None:
        self.networks = list(networks)
        self.crop_sizes = [None] * len(self.networks) if crop_sizes is None else list(crop_sizes)
        self.weights = {"mse": mse, "l1": l1, "perceptual": perceptual, "lpips": lpips}
        self.adversarial = adversarial
        self._added_terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name, weight in self.weights.items():
            _check_weight(name, weight)
        if (perceptual > 0 or lpips > 0) and not self.networks:
            raise ValueError(
                f"the weights of perceptual ({perceptual}) and lpips ({lpips}) need a feature network: give one, or "
                "set both weights to 0."
            )
        if len(self.crop_sizes) != len(self.networks):
            raise ValueError(f"{len(self.crop_sizes)} crop sizes for {len(self.networks)} networks: give one for each.")

    @classmethod
    def from_config(
        cls,
        config: LossConfig,
        device: torch.device | str,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype | None = None,
        load_weights: bool = True,
        networks: Mapping[str, PerceptualTrunk] | None = None,
    ) -> ReconstructionLoss:
        """Build the loss of a configuration and load its networks.

        Args:
            config: The `loss` section.
            device: Of the networks.
            memory_format: Of the networks' weights.
            dtype: Of the weights of the layers, default float32. With that of autocast they are cast once and not in
                every pass, with the same results.
            load_weights: False gives random weights, see `PerceptualTrunk`.
            networks: Networks that are loaded already, by name; they are used as they are.

        Raises:
            ValueError: Weights that cannot be found, read or matched.
        """
        loaded = dict(networks or {})
        for name, _ in config.trunks:
            if name not in loaded:
                network = PerceptualTrunk(name, config.trunk_weights, load_weights=load_weights)
                network.layers.to(dtype)
                loaded[name] = network.to(device, memory_format=memory_format)
        used = [loaded[name] for name, _ in config.trunks]
        adversarial = None
        if config.adversarial_weight > 0:
            adversarial = AdversarialLoss([network.channels for network in used], config, device)
        return cls(
            used,
            [crop_size for _, crop_size in config.trunks],
            adversarial=adversarial,
            mse=config.mse_weight,
            l1=config.l1_weight,
            perceptual=config.perceptual_weight,
            lpips=config.lpips_weight,
        )

    def add_term(self, name: str, weight: float, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Add a term to the sum and to the log, as `loss/<name>` and `weighted/<name>`.

        Args:
            name: Must be new.
            weight: Finite, at least 0; with 0 the term is logged only.
            function: Maps the reconstruction and its target, (N, 3, H, W), to one value per image, (N,), float32. It
                runs outside autocast; the reconstruction may have another floating-point dtype.

        Raises:
            ValueError: The name is taken, or the weight is negative or not finite.
        """
        if name in self.weights or name in _RESERVED or "/" in name:
            raise ValueError(f"a loss term cannot be called {name!r}: use a name that is not taken, without '/'.")
        _check_weight(name, weight)
        self.weights[name] = weight
        self._added_terms[name] = function

    def check_resolution(self, resolution: int) -> None:
        """Check that images of a resolution, and the crops of them, are large enough for the networks.

        Raises:
            ValueError: They are not; the message names the configuration key.
        """
        for key, network, crop_size in zip(("loss.trunk", "loss.lpips_trunk"), self.networks, self.crop_sizes):
            network.check_size(min(crop_size or resolution, resolution), key)

    def __call__(
        self, reconstruction: Tensor, pixels: Tensor, crops: Sequence[Tensor | None] | None = None
    ) -> dict[str, Tensor]:
        """Compute the raw terms.

        Each network runs once on the targets, without gradient, and once on the reconstructions, and not at all when
        both perceptual terms have weight 0.

        Args:
            reconstruction: (N, 3, H, W), about [-1, 1], not clamped; any floating-point dtype.
            pixels: The targets, same shape, in [-1, 1].
            crops: Positions of each network's random crops (`random_crops`), or None where it reads full images;
                omitted, all networks do.

        Returns:
            Term -> (N,), float32: `mse`, `l1`, `perceptual` and `lpips` (absent where no network runs: a 0 in the log
            would look like a perfect score), then the added terms; with `self.adversarial` also `adversarial`.

        Raises:
            ValueError: The shapes differ.
        """
        if reconstruction.shape != pixels.shape:
            raise ValueError(
                f"the reconstruction is {tuple(reconstruction.shape)} and its target {tuple(pixels.shape)}: give equal "
                "shapes."
            )
        terms: dict[str, Tensor] = {}
        with full_precision(pixels.device):
            difference = reconstruction.float() - pixels.float()
            terms["mse"] = torch.linalg.vector_norm(difference, dim=(1, 2, 3)).square() / pixels[0].numel()
            terms["l1"] = torch.linalg.vector_norm(difference, ord=1, dim=(1, 2, 3)) / pixels[0].numel()
        if self.weights["perceptual"] > 0 or self.weights["lpips"] > 0:
            lpips, pairs, in_training = [], [], self.adversarial is not None and reconstruction.requires_grad
            inputs, targets = self._network_inputs(reconstruction, pixels, crops)
            for network in self.networks:
                with torch.no_grad():
                    target_features = network.activations(targets.pop())
                features = network.activations(inputs.pop())
                if not lpips:
                    terms["perceptual"], distance = network.distances(features, target_features)
                else:
                    distance = network.lpips(features, target_features)
                lpips.append(distance)
                if in_training:
                    pairs.append((features, target_features))
            if in_training:
                terms["adversarial"] = self.adversarial.generator_loss(pairs)
            with full_precision(pixels.device):
                terms["lpips"] = torch.stack(lpips).mean(dim=0)
        with full_precision(pixels.device):
            for name, function in self._added_terms.items():
                terms[name] = function(reconstruction, pixels)
        return terms

    def _network_inputs(
        self, reconstruction: Tensor, pixels: Tensor, crops: Sequence[Tensor | None] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each network reads of the reconstructions and of the targets, from the last network to the first.

        The images are cropped in the dtype of the networks, which halves the bytes of a gather under autocast.
        """
        images = [self.networks[0].subtract_mean(each) for each in (reconstruction, pixels)]
        crops = [None] * len(self.networks) if crops is None else crops
        pairs = [
            images if positions is None else random_crops(images, positions, size)
            for positions, size in zip(crops, self.crop_sizes, strict=True)
        ]
        return [reconstructed for reconstructed, _ in pairs][::-1], [target for _, target in pairs][::-1]


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"the weight of {name} is {weight}: give a finite number, 0 or larger.")


def vae_loss(
    loss: ReconstructionLoss,
    reconstruction: Tensor,
    pixels: Tensor,
    posterior_mean: Tensor,
    posterior_logvar: Tensor,
    *,
    beta: float | Tensor,
    crops: Sequence[Tensor | None] | None = None,
    adversarial_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of one batch, and its parts for the log.

    Args:
        loss: The reconstruction terms.
        reconstruction, pixels, crops: See `ReconstructionLoss.__call__`.
        posterior_mean: (N, ...).
        posterior_logvar: The same shape, natural logarithm of the variance.
        beta: Weight of KL, the mean of `kl_per_dimension`.
        adversarial_weight: Weight of the adversarial term, if there is one.

    Returns:
        The total, a float32 scalar with gradient: the mean over images. And detached float32 scalars: each raw term of
        `loss` and `kl` (nats per dimension); the same under `weighted/`, times their weight (`kl` times beta);
        `reconstruction`, the sum of the weighted terms without KL and the adversarial term; `total`. With an adversarial
        term also `gradient/reconstruction` and `gradient/adversarial`: the norms of the gradients of `reconstruction` and
        `adversarial` at the reconstruction of an image, mean over images.

    Raises:
        ValueError: Shapes that differ.
    """
    terms = loss(reconstruction, pixels, crops)
    with full_precision(pixels.device):
        parts = {name: term.mean() for name, term in terms.items()}
        adversarial = parts.pop("adversarial", None)
        weighted = {name: loss.weights[name] * value for name, value in parts.items()}
        # A term of weight 0 stays out of the sum: 0 times infinity would be NaN.
        summed = [value for name, value in weighted.items() if loss.weights[name] > 0]
        reconstruction_loss = sum(summed[1:], summed[0]) if summed else torch.zeros((), device=pixels.device)
        parts["kl"] = kl_per_dimension(posterior_mean, posterior_logvar).mean()
        weighted["kl"] = beta * parts["kl"]
        total = reconstruction_loss + weighted["kl"]
        if adversarial is not None:
            parts["adversarial"], weighted["adversarial"] = adversarial, adversarial_weight * adversarial
            total, norms = _with_adversarial(
                reconstruction, reconstruction_loss, adversarial, adversarial_weight, weighted["kl"]
            )
            parts |= norms
        parts |= {f"weighted/{name}": value for name, value in weighted.items()}
        parts |= {"reconstruction": reconstruction_loss, "total": total}
    return total, {name: value.detach() for name, value in parts.items()}


def _with_adversarial(
    reconstruction: Tensor, reconstruction_loss: Tensor, adversarial: Tensor, weight: float, weighted_kl: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total with the adversarial term, and the norms of both gradients at the reconstruction.

    The gradients go through the feature networks here, once each; the total continues from the reconstruction, with the
    value of the sum and its gradient.
    """
    own = torch.autograd.grad(reconstruction_loss, reconstruction, retain_graph=True)[0].float()
    other = torch.autograd.grad(adversarial, reconstruction)[0].float()
    norms = {
        f"gradient/{name}": len(gradient) * torch.linalg.vector_norm(gradient, dim=(1, 2, 3)).mean()
        for name, gradient in (("reconstruction", own), ("adversarial", other))
    }
    linear = (reconstruction.float() * (own + weight * other)).sum()
    value = (reconstruction_loss + weight * adversarial).detach()
    return value + (linear - linear.detach()) + weighted_kl, norms
