"""Chaos: whole migrations while wires break and workers die, everything drawn from a seed.

``plan``       what happens in one migration, and at which byte
``guest``      a process that checks and rewrites all of its memory as long as the migration lasts
``operator``   who is told that the migration is paused, and has it go on
``killer``     who sends signals to workers
``migration``  one migration with all of them, and its verdict
``__main__``   ``python -m tests.chaos``: many of them, a line for each

A run is replayed by its seed: moments are bytes that went over the wire. What the guest reads and
when is the scheduler's, so a replay is the same storm, not the same instructions.
"""
