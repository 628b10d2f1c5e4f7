"""The pre-flight check: compile the training step for hardware that is not here, and say what it would need."""
