"""F4: what a step will take before it is queued: memory, FLOPs, tokens, messages. Arithmetic alone: no torch here."""
