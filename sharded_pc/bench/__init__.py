"""Measurements: the product beside a bare loop that does the least possible, in one run.

`rig.py` is the product (memory, worker processes, a guest process) driven without a source;
`bare.py` is the floor; `place.py` and `fault.py` say what is measured; `report.py` prints it.
"""
