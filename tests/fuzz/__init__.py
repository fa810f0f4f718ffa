"""Fuzzers: whatever bytes come, a parser takes them or refuses them with its one kind of error.

`targets/` has one module for each parser in Python, `native/` one file for each in C; they begin
with `seeds.py` and `corpus/`.  tests/test_fuzz.py runs a fixed number of changes of these; `make
fuzz` runs for hours, led by coverage: atheris for Python, libFuzzer for C, chance without them.
"""
