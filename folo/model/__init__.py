"""Parameters as a pytree, and the forward pass as a function of them."""

from folo.model.config import DecoderConfig
from folo.model.forward import forward
from folo.model.params import Params

__all__ = ["DecoderConfig", "Params", "forward"]
