"""Score experts on a task's test split, and compare methods over draws of few labels."""
