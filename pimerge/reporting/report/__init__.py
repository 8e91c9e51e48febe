"""One HTML page of what lies in a folder: what it says (``document``), where that comes from, how it looks."""
