"""F4: what a run leaves on disk and resumes from, and the ways from and to Hugging Face folders.

What a floor is: docs/architecture.md, "Rooms and floors".
"""
