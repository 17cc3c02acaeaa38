"""One thread per process: threads that spin for a core held by another process cost a factor of three."""

import os

# Before anything imports torch; children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
