"""What is proved of the winner, and how anyone can check it. No Ray."""
