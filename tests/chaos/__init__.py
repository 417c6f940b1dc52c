"""The crash matrix: real processes that are killed at every step, and counts of what got lost.

``make chaos`` runs it and writes the table of ``docs/guarantees/matrix.rst``. A small application
(:mod:`tests.chaos.application`) dispatches all the time; :mod:`tests.chaos.faults` are the ways in
which its processes, its broker, its database and its network fail; :mod:`tests.chaos.campaign`
injects them one after another; :mod:`tests.chaos.tally` counts what has become of each dispatch.
The library knows nothing of all this: :mod:`tests.chaos.crashpoints` wraps methods from outside.
"""
