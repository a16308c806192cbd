"""What is done with finished files: each tool in a file of its own, as a function, and behind a command of `cli`."""
