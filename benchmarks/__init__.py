"""Workloads of the engine, measured beside the machine's floor and beside other engines. See README.md."""
