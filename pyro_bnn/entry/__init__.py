"""The entry to public functions: arguments are checked before anything is set up, and a thread waits for its turn."""
