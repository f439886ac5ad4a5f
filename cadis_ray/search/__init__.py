"""What is tried next, and what wins. No Ray."""
