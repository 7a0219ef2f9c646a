"""How many hosts so many users need, on paper: ``python -m benchmarks.hosts``.

Nothing is served. :mod:`~benchmarks.hosts.speeds` has what one host takes for a step and for a
prompt, as ``make rehearsal`` found it; :mod:`~benchmarks.hosts.simulation` lets users ask such
hosts in simulated time. ``python -m benchmarks.hosts.router`` puts SGLang's real router before
four servers of those speeds.
"""
