"""Recognises quantised weights, and says what to do first. They are never read as if they were plain numbers. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of safetensors whose numbers mean what they say."""
_QUANTISED = re.compile(
    r"\.(weight_scale(_inv)?|weight_scale_2|weight_shape|weight_packed|weight_zero_point|weight_g_idx|weight_global_scale|"
    r"input_scale(_inv)?|input_global_scale|output_scale|activation_scale|[kqv]_scale|qweight|qzeros|g_idx|scales|zeros|scb|"
    r"weight_format|absmax|quant_map|nested_absmax|nested_quant_map|quant_state(\..*)?|blocks)$"
    r"|_(blocks|scales|scale_inv|bias_scale)$|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state).*$",
    re.IGNORECASE,
)
"""Names of what quantised weights are stored with, by all common methods."""


def is_quantised(name: str) -> bool:
    """Whether a tensor of this name comes with quantised weights."""
    return _QUANTISED.search(name) is not None


def quantised(folder: Path | str, actual: str) -> ConfigError:
    """The error for weights that are not plain numbers, with the way out."""
    return ConfigError(
        f"model.path {folder}",
        found=actual,
        expected=f"weights in plain floating point ({', '.join(PLAIN_DTYPES)}), as they are trained",
        hint="dequantise first: AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype='bfloat16').dequantize(), for fp8 and mxfp4 "
        "from_pretrained(DIRECTORY, quantization_config=FineGrainedFP8Config(dequantize=True) or Mxfp4Config(dequantize=True)); "
        "del model.config.quantization_config; model.save_pretrained(OUT), then model.path=OUT. Or take the model as it was before",
    )
