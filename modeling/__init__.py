"""The model, and all that `from_pretrained` needs."""

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

__all__ = ["AutoencoderKLUltra"]
