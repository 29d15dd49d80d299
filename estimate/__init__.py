"""What will it cost?

Bytes and seconds of a configuration before they are spent: the ledger, its certificate, the solver of memory policies, suggestions
where nothing fits. Pure: no torch, no clock, no environment. launcher/ and training/ import build, ledger, certificate and suggestions;
nothing below may import this.
"""
