"""Are the tests sharp? Small faults, one at a time, and the test that finds each: ``make mutants``.

``faults.toml`` lists the faults; ``python -m tests.mutants --help`` says how to run some of them.
"""
