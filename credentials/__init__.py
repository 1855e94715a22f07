"""What proves who somebody is: passwords and one-time codes. No SQL, no HTTP, and no clock of their own."""
