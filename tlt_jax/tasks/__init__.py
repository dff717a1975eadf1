"""Synthetic reasoning tasks: prompts, demonstrations of them, and rule-based rewards."""
