"""What is done to modules from outside: modes, exchanged forwards, hooks, norms over a part."""
