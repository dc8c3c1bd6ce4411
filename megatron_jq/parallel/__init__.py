"""F2: processes, groups and the log-probability arithmetic that crosses them."""
