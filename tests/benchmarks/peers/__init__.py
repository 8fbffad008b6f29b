"""Our methods beside every library that does the same work: ``python -m tests.benchmarks.peers``.

A row is one piece of work. Its alternatives take turns in one process, and every figure is a ratio to a plain step of
torch with the same network and optimiser in that process, unless the row says otherwise; several fresh processes give
the range. The peers are the extra ``benchmarks``; one that is not installed, or cannot do the work, says so in the row.

``--beside PATH`` measures our alternatives of another checkout too, in processes of its own that alternate with these
and in which the same peers run.
"""
