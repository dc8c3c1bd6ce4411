"""F2: where prompts and gold answers come from, their token ids, and the order in which they are trained on."""
