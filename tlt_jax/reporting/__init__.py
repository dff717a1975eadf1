"""A run's files and what a person sees of them: log writers, pictures and the summary page."""
