"""F4: what a step costs: seconds, tokens, memory, messages and arithmetic of rollout, score and train."""
