"""Which kernels are found on disk, from packages that look like the real ones and cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.parallel.sequence.installed_kernels import UNKNOWN, has_module, installed_versions


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def put(site: Path, *files: str, name: str = "", version: str = "") -> None:
    """Files that raise where they are imported, and the metadata of their distribution."""
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("raise ImportError('needs a GPU')\n")
    if name:
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_nothing_is_installed(site: Path) -> None:
    assert installed_versions() == {}


def test_flash_attn_4_alone_is_no_flash_attn(site: Path) -> None:
    put(site, "flash_attn/cute/__init__.py", "flash_attn/cute/interface.py", name="flash_attn_4", version="4.0.1")
    assert installed_versions() == {"fa4": "4.0.1"}
    assert not has_module("flash_attn.flash_attn_interface"), "flash_attn is a namespace"


def test_packages_are_found_without_importing_them(site: Path) -> None:
    put(site, "flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", name="flash_attn", version="2.8.3")
    put(site, "flash_attn_interface.py", name="flash_attn_3", version="3.0.0")
    assert installed_versions() == {"fa3": "3.0.0", "fa2": "2.8.3"}


def test_a_package_without_a_distribution_has_no_version(site: Path) -> None:
    put(site, "flash_attn_interface.py")
    assert installed_versions() == {"fa3": UNKNOWN}
    (site / "flash_attn_interface.py").unlink()
    (site / "flash_attn_interface").mkdir()
    assert not has_module("flash_attn_interface"), "an empty folder is a namespace too"


def test_the_part_that_flash_attn_ships_is_no_flash_attn_4(site: Path) -> None:
    files = ("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", "flash_attn/cute/__init__.py", "flash_attn/cute/interface.py")
    put(site, *files, name="flash_attn", version="2.8.3")
    assert installed_versions() == {"fa2": "2.8.3"}
