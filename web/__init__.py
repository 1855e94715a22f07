"""Between the socket and the routes: HTTP parsing, scheduling, request checks and form reading."""
