"""What came out, and who is told."""
