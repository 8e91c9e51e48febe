"""The HTML report on the documents of a folder."""
