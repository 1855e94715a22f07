"""What is stored beside users and sessions, one file for each concern, over the same engine."""
