"""Make a plan true while the model runs: each block is where it must be exactly while its forward runs.

`schedule` decides what is fetched and evicted next and knows no memory; a mover (`mapped` for disk → CPU, `slots` for
anything → accelerator) moves bytes and decides nothing; `hooks` tells the schedule who enters and leaves; `residency`
is the lifetime of it all.
"""
