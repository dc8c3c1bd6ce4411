"""F4: the training loop: rollouts, scores, coefficients, step."""
