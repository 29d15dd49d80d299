"""Which attention kernels this Python has: looked for on disk, for importing them needs a GPU's libraries. Imports no torch.

A package that is only a namespace tells nothing: flash-attn-4 installs flash_attn/cute and no flash_attn/flash_attn_interface.py, so
it is the file with the functions that is looked for, below the parent that `find_spec` names. The wheel of flash-attn 2.8.3 has a
flash_attn/cute too, which is not FlashAttention 4: that kernel counts only where its own distribution is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PLACES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fa4": ("flash_attn.cute.interface", ("flash-attn-4", "flash_attn_4", "flash-attn-cute")),
    "fa3": ("flash_attn_interface", ("flash-attn-3", "flash_attn_3")),
    "fa2": ("flash_attn.flash_attn_interface", ("flash-attn", "flash_attn")),
}
"""Kernel: the module with its functions, and names of the distribution that brings it."""
UNKNOWN = "?"
_IN_OTHERS = ("fa4",)
"""Kernels whose module another package ships too."""


def installed_versions() -> dict[str, str]:
    """Versions of the kernels whose module is there, by their names; `?` where no distribution says, which FlashAttention 4 needs."""
    found = {kernel: _version(names) for kernel, (module, names) in PLACES.items() if has_module(module)}
    return {kernel: number for kernel, number in found.items() if kernel not in _IN_OTHERS or number != UNKNOWN}


def has_module(module: str) -> bool:
    """Whether the file of `module` is there. Imports neither it nor what it lies in."""
    top, *below = module.split(".")
    spec = _spec(top)
    if spec is None:
        return False
    if not below:
        return spec.origin is not None
    folders = [Path(place, *below[:-1]) for place in spec.submodule_search_locations or ()]
    return any((folder / f"{below[-1]}.py").is_file() or (folder / below[-1] / "__init__.py").is_file() for folder in folders)


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ValueError:  # a module that is in memory already, and has no spec
        return None


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return UNKNOWN
