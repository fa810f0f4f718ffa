"""Fakes and oracles that tests, benchmarks and the demo share, for users' tests too.

What is fake is called so: the synthetic source speaks the real stream over a real socket, but no
VM stands behind it; the visiting guest is a real process on real memory, but it is no VM either.
"""
