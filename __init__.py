"""efflaunch: train language models on very long and very unequal sequences."""

__version__ = "0.1.0"
