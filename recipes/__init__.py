"""Programs. Importing them settles, before torch is loaded, how its threads wait for each other."""

import os

# By default OpenMP's threads spin while they wait. Where another program has work for the same cores, each
# spinning thread takes the core from the one it waits for: a training pass of 1.4 s took 20 to 50 s so, and
# 7 s with threads that sleep. On idle cores training is as fast, and a small forward pass a fifth slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
