"""Names the C++ compilers that are looked for on this machine, and the packages that bring one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

COMPILERS = ("c++", "g++", "clang++")
PACKAGE = "g++ (apt-get install g++, dnf install gcc-c++, apk add g++, conda install gxx)"


def compiler_path(names: Iterable[str] = COMPILERS) -> str | None:
    """Return the file of the first of `names` that is on PATH; None where none is."""
    return next((path for name in names if (path := shutil.which(name))), None)
