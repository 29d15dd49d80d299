"""What pictures of plans share: matplotlib where it is installed, and files that are the same for the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")


def check_format(path: Path) -> None:
    """ConfigError for a file that ends otherwise; `path` is an option's."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError("--out", found=str(path), expected=f"a file that ends in {', '.join(FORMATS)}", hint=f"--out {path.stem}.svg")


def figure_kind() -> type[Figure]:
    """matplotlib's figure, whose text stays text; ConfigError where matplotlib is missing."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--out", found="no matplotlib", expected="it, to draw pictures", hint="pip install 'efflaunch[plot]', or leave --out out"
        ) from error
    # Text stays text and ids do not change from run to run.
    rcParams["svg.fonttype"], rcParams["svg.hashsalt"] = "none", "efflaunch"
    return Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date inside: the same plan gives the same file.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    figure.savefig(path, dpi=160, metadata=metadata)
