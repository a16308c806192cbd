"""What outlives a process: a run's training state, and whose files are in its folder.

training_state                  what a state keeps, saving it and going on from it
optimizer_state, partitioned    the optimizer's part: of any class, and divided by DeepSpeed's ZeRO
state_files                     the files, of which there is a whole state at every instant
interrupts                      ends of a process that wait for the end of a step
run_identity                    which run made a file
"""
