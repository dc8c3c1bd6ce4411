"""F3: Megatron-core's GPTModel (or HybridModel) as a policy, its J_Q head, and the rows of tokens that it reads.

What a floor is: docs/architecture.md, "Rooms and floors".
"""
