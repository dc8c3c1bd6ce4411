"""F4: what is checked on every node of a job before its ranks start: in seconds, by name, without torch or GPUs."""
