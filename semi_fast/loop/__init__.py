"""What happens in a step and between steps."""
