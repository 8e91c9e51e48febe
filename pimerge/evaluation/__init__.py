"""Score experts on a task's test split, and compare methods over several samplings of few labels."""
