"""One HTML page about the documents in a folder: its content, where that comes from, and how it looks."""
