"""A running server from outside: HTTP, launch, the embedded model, the machine."""
