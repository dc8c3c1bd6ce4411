"""F1: data formats: how a record of each becomes a prompt and a gold answer. Pure functions of a record."""
