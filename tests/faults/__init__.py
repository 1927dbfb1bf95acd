"""A harness that looks for faults: hostile files, bad command lines, interruptions, and surroundings that fail.

    make faults                                     # everything, some minutes
    PYTHONPATH=tests .venv/bin/python -m faults --only pickles --count 50 --seed 1
    PYTHONPATH=tests .venv/bin/python -m faults --only kills --count 100     # of jobs; only where it is asked for

It makes its inputs when it runs, from a seed, and prints counts. SECURITY.md says what they stand for.
"""
