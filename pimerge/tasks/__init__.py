"""Tasks: task.json, reading rows, drawing few labels; one file per task type and per metric."""
