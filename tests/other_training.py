"""The efflaunch command with another training function, for scripts that tests start."""

from __future__ import annotations


def run_with(entry: str) -> int:
    """Exit as efflaunch would; `entry` as module:function."""
    from efflaunch.launcher import cli, start

    real, array = start.launch, start.launch_array
    start.launch = lambda config, run_dir=None: real(config, run_dir, entry=entry)  # type: ignore[assignment]
    start.launch_array = lambda configs, folder: array(configs, folder, entry=entry)  # type: ignore[assignment]
    return cli.main()
