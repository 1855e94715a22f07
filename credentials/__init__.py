"""Credentials: passwords and one-time codes. Pure functions without SQL, HTTP or a clock of their own."""
