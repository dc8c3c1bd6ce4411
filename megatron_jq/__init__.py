"""megatron-jq: post-train reasoning policies on Megatron-core with the Tsallis J_Q loss (GARL, PAFT).

Importing this package imports nothing heavy; each room is imported by its own name.
"""

__version__ = "0.1.0"
