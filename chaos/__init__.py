"""The crash matrix: real processes that are killed at every step, and counts of what got lost.

``make chaos`` runs it and writes the table of ``docs/guarantees/matrix.rst``. A small application
(:mod:`chaos.application`) dispatches all the time; :mod:`chaos.faults` are the ways in which its
processes, its broker, its database and its network fail; :mod:`chaos.campaign` injects them one
after another; :mod:`chaos.tally` counts what has become of each dispatch. The library knows nothing
of all this: :mod:`chaos.crashpoints` wraps its methods from outside.
"""
