"""The command line: one file per command. Only this folder knows Typer and Rich."""
