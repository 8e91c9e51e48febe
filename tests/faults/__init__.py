"""What happens when a command is stopped, refused something, or given a broken file."""
