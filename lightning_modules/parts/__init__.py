"""What methods and callbacks both need; each module is imported by its own name."""
