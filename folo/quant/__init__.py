"""Weights in a few bits: GPTQ, and what is lost by it."""

from folo.quant.calibration import default_text, sequences
from folo.quant.decoder import nearest, quantize
from folo.quant.evaluate import Comparison, Perplexity, compare, perplexity
from folo.quant.gptq import QuantConfig

__all__ = [
    "Comparison",
    "Perplexity",
    "QuantConfig",
    "compare",
    "default_text",
    "nearest",
    "perplexity",
    "quantize",
    "sequences",
]
