"""Tasks: task.json, reading rows, sampling few labels; one file per task type and per metric."""
