"""The operator's commands, and the file formats and copies that they use."""
