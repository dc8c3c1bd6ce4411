"""megatron-jq: post-train reasoning policies on Megatron-core with the Tsallis J_Q loss (GARL, PAFT).

Importing this package imports nothing heavy; each room is imported by its own name. A module's docstring
begins with its floor (docs/architecture.md, "Rooms and floors").
"""

__version__ = "0.1.0"
