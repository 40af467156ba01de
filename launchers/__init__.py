"""How a run starts: the command line, the executors of submitit, and what a user sees while it runs."""
