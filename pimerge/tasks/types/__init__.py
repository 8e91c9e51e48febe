"""Types of task, one file each."""
