"""The tests, one file for each source file, and what they share."""
