"""What customers do not see."""
