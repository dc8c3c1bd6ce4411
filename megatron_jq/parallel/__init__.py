"""F2: processes, groups and the log-probability arithmetic that crosses them.

What a floor is: docs/architecture.md, "Rooms and floors".
"""
