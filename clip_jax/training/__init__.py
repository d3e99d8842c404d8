"""The train state, the step, and the loop that runs it."""
