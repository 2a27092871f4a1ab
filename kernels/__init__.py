"""Ops that the compiler cannot write well, each under a contract. See `contract.py` for what a contract is."""
