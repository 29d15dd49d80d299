"""NF4 read by numpy alone, and a peft model whose frozen matrices are what was packed: the truth for QLoRA."""

from __future__ import annotations

import numpy as np
import torch

from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.names import quantized_names
from efflaunch.model.adapters.nf4 import LEVELS, pack
from efflaunch.tests.parity.peft_reference import arrays, lifted


def qlora(**fields) -> AdapterConfig:
    """As `lora` of peft_reference.py, beside packed matrices."""
    return AdapterConfig(name="qlora", method=AdapterMethod.QLORA, **{"rank": 3, "alpha": 7.0, **fields})


def read_nf4(packed: np.ndarray, columns: int) -> np.ndarray:
    """Rows of bytes as numbers (M, columns) in float32, byte by byte as the layout says."""
    blocks = -(-columns // 64)
    groups, codes = -(-blocks // 256), 32 * blocks
    high_first = np.stack((packed[:, :codes] >> 4, packed[:, :codes] & 15), -1).reshape(len(packed), blocks, 64)
    scales = np.ascontiguousarray(packed[:, codes : codes + blocks]).view(np.int8).astype(np.float32)
    first = codes + -(-blocks // 4) * 4
    pairs = np.ascontiguousarray(packed[:, first : first + 8 * groups]).view(np.float32).reshape(len(packed), groups, 2)
    mean, widest = (np.repeat(pairs[..., part], 256, axis=1)[:, :blocks] for part in (0, 1))
    scale = np.maximum(scales / np.float32(127) * widest + mean, np.float32(0))
    return (np.asarray(LEVELS, np.float32)[high_first] * scale[..., None]).reshape(len(packed), -1)[:, :columns]


def packed_and_plain(family: str, dtype: str, config: AdapterConfig):
    """(weights by our names with packed matrices, the peft model with the same numbers wide, its parameters by our names)."""
    model, named = lifted(family, dtype, config)
    packed = {}
    for name, parameter in named.items():
        if name.endswith(tuple(f".{matrix}.weight" for matrix in quantized_names(config))):
            own = packed[name.removesuffix("weight") + "packed"] = pack(parameter.detach()).numpy()
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(read_nf4(own, parameter.shape[1])))
    weights = arrays(named)
    return {name: value for name, value in weights.items() if name.removesuffix("weight") + "packed" not in packed} | packed, model, named
