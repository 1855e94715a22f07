"""What is stored in addition to users and their sessions, one file for each concern, over the same engine."""
