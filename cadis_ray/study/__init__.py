"""What was asked: the study file, its rules, and what it will cost."""
