"""The host side: requests, blocks, the scheduler and text. Nothing here imports torch."""
