"""The simulator: production `Session` and `Core` under one seeded clock, network and crashes.

One seed is one run, and replays identically. `world.py` plays clients, network, broker and faults; `apps.py` and
`members.py` (consumer groups) are what runs on the clients; `oracle.py` knows what must be in the log and where each
group must stand, and judges every answer; `coverage.py` counts which branches a run went through; `mutants.py`
lists planted bugs. `python -m tests.sim` runs many seeds.
"""
