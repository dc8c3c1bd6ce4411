"""F4: what a run leaves on disk and takes up again, and the ways from and to Hugging Face folders."""
