"""`python drive.py key=value ...`: the efflaunch command with the fake training function instead of the real one."""

from __future__ import annotations

import sys

from efflaunch.launcher import cli, start


def main() -> int:
    """Exit as efflaunch would."""
    real = start.launch
    start.launch = lambda config, run_dir=None: real(config, run_dir, entry="fake_training:train")  # type: ignore[assignment]
    array = start.launch_array
    start.launch_array = lambda configs, folder: array(configs, folder, entry="fake_training:train")  # type: ignore[assignment]
    start.check_data = lambda config: None
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
