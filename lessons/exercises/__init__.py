"""Exercises that together are the model. Each is a file with a task and a stub; what is written there takes the place
of the real function, and the project's own tests say whether it is right: `make exercise N=1`."""
